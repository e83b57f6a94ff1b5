r"""Trajectories whose bookkeeping runs in C++, where the leapfrog was compiled as well.

Between two calls of a compiled leapfrog of a small network, Python spent a third of the time: generators, copies of
single rows, a dozen operations on scalars a chain. ``trajectories.cpp`` does the same for all chains of a block in one
call and comes back to Python only for the chains whose trajectory is over. Its decisions are those of
:meth:`inference.mcmc.nuts.NUTSKernel.transition` from the same random numbers, so the draws are the same to the bit.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from inference.mcmc.lanes import Block

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("trajectories.cpp")
# Mode of a lane: Python decides after every leapfrog, C++ until the tree or the number of steps ends, nobody any more.
ASK, TREE, FIXED, FINISHED = range(4)
# What a lane remembers, in rows of P numbers: its first end, and the chosen point.
_HELD_ROWS, _VELOCITY, _CHOSEN, _STATE_ROWS = 19, 4, 10, 4
_NAMES = {torch.float32: "float", torch.float64: "double"}
_INTS = ("mode", "max_depth", "length", "num_steps", "depth", "leaf", "forward", "turned", "diverging")
_DOUBLES = (
    *("step_size", "start_energy", "log_weight", "new_weight", "acceptance"),
    *("energy", "log_density", "candidate_energy", "candidate_log_density"),
)
_Refill = ctypes.PYFUNCTYPE(None, ctypes.c_int64)


class Trajectory(ctypes.Structure):
    """Figures of the trajectory of one lane; those of :class:`~inference.mcmc.lanes.Transition` when it is over."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTS),
        *((name, ctypes.c_double) for name in _DOUBLES),
        ("uniforms", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_lanes", "dim", "num_slots")),
        ("trajectories", ctypes.POINTER(Trajectory)),
        *((name, ctypes.c_void_p) for name in ("held", "slots", "steps", "leapfrogs", "attention")),
        ("refill", _Refill),
    ]


class NativeTrajectories:
    """The trajectories of all lanes of a block.

    Args:
        block: The block, on a CPU.
        library: What :func:`load` returned.
    """

    def __init__(self, block: Block, library: Any) -> None:
        state, num = block.state, len(block.lanes)
        self.block = block
        self.figures = (Trajectory * num)()
        self.held = state.new_zeros(num, _HELD_ROWS, state.shape[2])
        self.attention = (ctypes.c_int64 * num)()
        name = _NAMES[state.dtype]
        self._advance, self._begin_tree = library[f"advance_{name}"], library[f"begin_tree_{name}"]
        self._advance.argtypes, self._advance.restype = [ctypes.c_void_p] * 4, ctypes.c_int64
        self._begin_tree.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._refill = _Refill(lambda index: block.lanes[index].refill())  # kept alive here
        self._struct = _Block(
            *(num, state.shape[2], block.slots.shape[2], self.figures, self.held.data_ptr(), block.slots.data_ptr()),
            *(block.steps.data_ptr(), block.leapfrogs.ctypes.data, ctypes.addressof(self.attention), self._refill),
        )
        self._address = ctypes.addressof(self._struct)

    def join(self, index: int, uniforms: int, left: int, moved: tuple[Trajectory, Tensor] | None) -> None:
        """Let a lane in.

        Args:
            index: Its place.
            uniforms: Address of its uniform numbers.
            left: Address of how many of them are unused.
            moved: Figures and rows of the trajectory that it is on, where it comes from another block.
        """
        if moved is not None:
            self.figures[index], self.held[index] = moved
        self.figures[index].uniforms, self.figures[index].left = uniforms, left

    def advance(self, state: Tensor, pair: Tensor, scalars: Tensor) -> list[int]:
        """Take the points of a leapfrog in.

        Args:
            state: State of all lanes, (4, C, P); where a trajectory changes its direction it is changed in place.
            pair: What a slot would store of it, (2, C, P).
            scalars: Log density, kinetic energy and U-turn bits, (C, 3) in float64.

        Returns:
            The lanes whose chains have to decide how to go on.
        """
        if not self._advance(self._address, state.data_ptr(), pair.data_ptr(), scalars.data_ptr()):
            return []
        return [index for index, waits in enumerate(self.attention) if waits]

    def begin_tree(self, index: int, row: Tensor, velocity: Tensor, figures: dict[str, float]) -> None:
        """Send a lane along a tree; it is waited for no more until the tree is complete.

        Args:
            index: The lane.
            row: State of the first point, (4, P).
            velocity: Its velocity, (P,).
            figures: ``max_depth``, ``step_size``, ``start_energy`` and ``log_density`` of the first point.
        """
        trajectory = self.figures[index]
        for name, value in figures.items():
            setattr(trajectory, name, value)
        trajectory.energy, trajectory.mode = trajectory.start_energy, TREE
        self.held[index, :_STATE_ROWS] = row
        self.held[index, _VELOCITY] = velocity
        self._begin_tree(self._address, index, self.block.state.data_ptr())

    def begin_steps(self, index: int, length: int) -> None:
        """Send a lane along ``length`` leapfrogs, or as many as stay finite."""
        trajectory = self.figures[index]
        trajectory.length, trajectory.num_steps, trajectory.mode = length, 0, FIXED

    def chosen(self, index: int) -> tuple[Tensor, Trajectory]:
        """Copy of the state (4, P) that the tree of a lane ended with, and its figures."""
        return self.held[index, _CHOSEN : _CHOSEN + _STATE_ROWS].clone(), self.figures[index]


@cache
def load() -> Any:
    """Compile the trajectories, once a machine, and load them.

    Returns:
        The library, or None where that fails: the trajectories in Python are always right.
    """
    try:
        from torch._inductor.codecache import CppCodeCache  # late: it imports all of Inductor

        # PyDLL keeps the interpreter's lock: a call takes a microsecond, and may ask Python for random numbers.
        return ctypes.PyDLL(CppCodeCache.load(SOURCE.read_text())._name)
    except Exception as error:  # a compiler has many ways to fail
        logger.warning("trajectories run in Python: compilation failed (%s)", type(error).__name__)
        return None
