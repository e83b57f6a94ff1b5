// What chains do between two calls of the recorded leapfrog: the bookkeeping of their trajectories.
//
// The same decisions, from the same numbers in the same order, as NUTSKernel.transition and HMCKernel.transition take
// in Python, which is the slow twin: the draws are those to the bit. Compiled and called by native.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace {

// Energy error in nats beyond which a trajectory has diverged; DIVERGENCE of lanes.py.
constexpr double kDivergence = 1000.0;

// Rows of a lane's state, and of what a lane remembers: two ends (state and velocity), two points, a sum of momenta.
enum Row { kPosition, kMomentum, kGradient, kMomentumSum, kStateRows };
enum Held { kEnds = 0, kEndRows = 5, kChosen = 10, kCandidate = 14, kRho = 18, kHeldRows = 19 };
// Who decides after a leapfrog: the chain's own code in Python, one of the two below, or nobody any more.
enum Mode : int64_t { kAsk, kTree, kFixed, kFinished };

}  // namespace

extern "C" {

// Fields as in native.py.
struct Trajectory {
  int64_t mode, max_depth, length, num_steps, depth, leaf, forward, turned, diverging;
  double step_size, start_energy, log_weight, new_weight, acceptance;
  double energy, log_density, candidate_energy, candidate_log_density;
  double* uniforms;
  int64_t* left;
};

struct Block {
  int64_t num_lanes, dim, num_slots;
  Trajectory* trajectories;
  void* held;   // (C, kHeldRows, P)
  void* slots;  // (2, C, K, P)
  void* steps;  // (C,)
  int64_t* leapfrogs;
  int64_t* attention;
  void (*refill)(int64_t);
};
}

namespace {

double log_add(double a, double b) {
  if (a < b) std::swap(a, b);
  return a + std::log1p(std::exp(b - a));
}

template <typename T>
class LaneView {
 public:
  LaneView(Block& block, int64_t index, T* state, const T* pair)
      : block_(block), index_(index), state_(state), pair_(pair), t_(block.trajectories[index]) {}

  // Start a tree from the point whose state and velocity are in both ends.
  void begin_tree() {
    T* end = held(kEnds);
    std::memcpy(held(kEndRows), end, kEndRows * bytes());
    std::memcpy(held(kChosen), end, kStateRows * bytes());
    std::memcpy(held(kRho), end + kMomentum * block_.dim, bytes());
    t_.log_weight = t_.acceptance = 0.0;
    t_.num_steps = t_.depth = t_.diverging = 0;
    begin_doubling();
  }

  // Take the new point in; whether the trajectory is over.
  bool advance(const double* scalars) {
    const double log_density = scalars[0], kinetic = scalars[1];
    ++t_.num_steps;
    if (t_.mode == kFixed) return t_.num_steps >= t_.length || !std::isfinite(log_density - kinetic);
    const double gain = log_density - kinetic + t_.start_energy;
    if (!(-kDivergence < gain && gain < std::numeric_limits<double>::infinity())) {
      t_.diverging = 1;
      return true;
    }
    t_.acceptance += gain > 0.0 ? 1.0 : std::exp(gain);
    t_.new_weight = log_add(t_.new_weight, gain);
    if (std::log(uniform()) <= gain - t_.new_weight) {
      copy_state(held(kCandidate));
      t_.candidate_energy = kinetic - log_density;
      t_.candidate_log_density = log_density;
    }
    const auto flags = static_cast<int64_t>(scalars[2]);
    int64_t checked, slot;
    plan(t_.leaf, &checked, &slot);
    if (flags & checked) return true;
    if (t_.leaf == 0) t_.turned = (flags >> far_slot()) & 1;
    if (t_.leaf + 1 < (int64_t{1} << t_.depth)) {
      std::memcpy(slot_velocity(slot), pair_ + index_ * block_.dim, bytes());
      std::memcpy(slot_sum(slot), pair_ + (block_.num_lanes + index_) * block_.dim, bytes());
      ++t_.leaf;
      return false;
    }
    return end_doubling((flags >> far_slot()) & 3);
  }

 private:
  size_t bytes() const { return block_.dim * sizeof(T); }
  int64_t levels() const { return t_.max_depth - 1; }
  int64_t far_slot() const { return 2 * levels(); }
  T* held(int64_t row) { return static_cast<T*>(block_.held) + (index_ * kHeldRows + row) * block_.dim; }
  T* state(int64_t row) { return state_ + (row * block_.num_lanes + index_) * block_.dim; }
  T* slot_velocity(int64_t slot) {
    return static_cast<T*>(block_.slots) + (index_ * block_.num_slots + slot) * block_.dim;
  }
  T* slot_sum(int64_t slot) { return slot_velocity(slot) + block_.num_lanes * block_.num_slots * block_.dim; }

  double uniform() {
    if (*t_.left == 0) block_.refill(index_);
    return t_.uniforms[--*t_.left];
  }

  void copy_state(T* target) {
    for (int64_t row = 0; row < kStateRows; ++row) std::memcpy(target + row * block_.dim, state(row), bytes());
  }

  void begin_doubling() {
    t_.forward = uniform() < 0.5;
    const T* near = held(kEnds + kEndRows * t_.forward);
    const T* far = held(kEnds + kEndRows * (1 - t_.forward));
    const T* rho = held(kRho);
    T* far_sum = slot_sum(far_slot());
    T* near_sum = slot_sum(far_slot() + 1);
    for (int64_t i = 0; i < block_.dim; ++i) {
      far_sum[i] = -rho[i];
      near_sum[i] = -near[kMomentum * block_.dim + i];
    }
    std::memcpy(slot_velocity(far_slot()), far + kStateRows * block_.dim, bytes());
    std::memcpy(slot_velocity(far_slot() + 1), near + kStateRows * block_.dim, bytes());
    for (int64_t row = 0; row < kStateRows; ++row) std::memcpy(state(row), near + row * block_.dim, bytes());
    static_cast<T*>(block_.steps)[index_] = static_cast<T>(t_.forward ? t_.step_size : -t_.step_size);
    t_.new_weight = -std::numeric_limits<double>::infinity();
    t_.turned = t_.leaf = 0;
  }

  bool end_doubling(int64_t ends_turned) {
    ++t_.depth;
    if (std::log(uniform()) <= t_.new_weight - t_.log_weight) {
      std::memcpy(held(kChosen), held(kCandidate), kStateRows * bytes());
      t_.energy = t_.candidate_energy;
      t_.log_density = t_.candidate_log_density;
    }
    if (t_.turned || ends_turned || t_.depth == t_.max_depth) return true;
    t_.log_weight = log_add(t_.log_weight, t_.new_weight);
    T* rho = held(kRho);
    const T* sum = state(kMomentumSum);
    for (int64_t i = 0; i < block_.dim; ++i) rho[i] += sum[i];
    T* end = held(kEnds + kEndRows * t_.forward);
    copy_state(end);
    std::memset(end + kMomentumSum * block_.dim, 0, bytes());
    std::memcpy(end + kStateRows * block_.dim, pair_ + index_ * block_.dim, bytes());
    begin_doubling();
    return false;
  }

  // See plan() in nuts.py.
  void plan(int64_t leaf, int64_t* checked, int64_t* slot) const {
    const int64_t ones = __builtin_popcountll(leaf >> 1);
    *checked = 0;
    if (leaf % 2 == 0) {
      if (leaf) *checked = int64_t{1} << __builtin_popcountll((leaf & (leaf - 1)) >> 1);
      *slot = ones;
      return;
    }
    const int64_t trailing = __builtin_ctzll(leaf + 1);
    for (int64_t k = ones - trailing + 1; k <= ones; ++k) *checked |= int64_t{1} << k;
    for (int64_t level = 1; level < trailing; ++level) *checked |= int64_t{1} << (levels() + level);
    *slot = levels() + trailing;
  }

  Block& block_;
  const int64_t index_;
  T* const state_;
  const T* const pair_;
  Trajectory& t_;
};

template <typename T>
int64_t advance(Block* block, void* state, void* pair, const double* scalars) {
  int64_t waiting = 0;
  for (int64_t lane = 0; lane < block->num_lanes; ++lane) {
    Trajectory& trajectory = block->trajectories[lane];
    block->attention[lane] = 0;
    if (trajectory.mode == kFinished) continue;
    ++block->leapfrogs[lane];
    if (trajectory.mode != kAsk) {
      LaneView<T> view(*block, lane, static_cast<T*>(state), static_cast<T*>(pair));
      if (!view.advance(scalars + 3 * lane)) continue;
      trajectory.mode = kAsk;
    }
    block->attention[lane] = 1;
    ++waiting;
  }
  return waiting;
}

}  // namespace

extern "C" {

// After a leapfrog: how many lanes wait for Python; `attention` says which.
int64_t advance_float(Block* block, void* state, void* pair, const double* scalars) {
  return advance<float>(block, state, pair, scalars);
}

int64_t advance_double(Block* block, void* state, void* pair, const double* scalars) {
  return advance<double>(block, state, pair, scalars);
}

// Start the tree of a lane from the point in its first end.
void begin_tree_float(Block* block, int64_t lane, void* state) {
  LaneView<float>(*block, lane, static_cast<float*>(state), nullptr).begin_tree();
}

void begin_tree_double(Block* block, int64_t lane, void* state) {
  LaneView<double>(*block, lane, static_cast<double*>(state), nullptr).begin_tree();
}
}
