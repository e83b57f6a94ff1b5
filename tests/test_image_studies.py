"""The image studies: networks, records of every row at the smallest sizes, and what the page makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.images import outside, page, records, resnet
from benchmarks.images.networks import Recipe, lenet, train
from benchmarks.images.networks import resnet as make_resnet
from benchmarks.records import keep
from bnn_zoo.data import load
from inference import MAP, DrawsPosterior, compile_target
from inference.linearised_draws import LinearisedDrawsPosterior

CHEAP = ("map", "kronecker_tuned", "kronecker_tuned_probit")
COSTLY = ("last_layer_tuned", "sampled", "sampled_em", "ensemble")


def images(shape: tuple[int, ...], num: int = 24, num_test: int = 10) -> records.Images:
    """Images whose class is the sign of their mean, and brighter ones as foreign."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num + num_test, *shape, generator=generator)
    y = (x.flatten(1).mean(1) > 0).long()
    foreign = {"notmnist": 5 + torch.randn(num_test, *shape, generator=generator)}
    return records.Images("mnist", x[:num], y[:num], x[num:], y[num:], foreign)


def records_of(rows: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    torch.set_default_dtype(torch.float32)
    found = images((1, 28, 28))
    trial = outside.Trial(found, outside.Sizes(steps=5, sampled_steps=2, batch=12), 0)
    return {row: records.run("outside", row, found, 0, trial.fit) for row in rows}


@pytest.fixture(scope="module")
def of_lenet() -> dict[str, dict[str, Any]]:
    return records_of(CHEAP)


@pytest.fixture(scope="module")
def of_resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("resnet")
    weights = folder / "weights.pt"
    options = resnet.Options(epochs=1, steps=2, batch=6, draws=3, blocks=1, width=2, weights=weights)
    trial = resnet.Trial(images((3, 32, 32)), options, folder)
    for row in resnet.ROWS:
        keep(folder / f"resnet-0-{row}.json", lambda row=row: trial.record(row))
    return folder, {row: json.loads((folder / f"resnet-0-{row}.json").read_text()) for row in resnet.ROWS}


def test_resnet_20_has_the_published_number_of_weights():
    assert sum(p.numel() for p in make_resnet(0).parameters()) == 269_722


def test_networks_of_one_seed_are_equal_and_of_two_seeds_differ():
    first, again, other = lenet(0), lenet(0), lenet(1)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_training_lowers_the_loss_and_leaves_batch_norm_in_eval_mode():
    found = images((3, 32, 32), num=64)
    net = make_resnet(0, blocks=1, width=4)
    losses = []
    for epochs in (0, 8):
        train(net, found.x, found.y, Recipe(epochs, batch=16))
        losses.append(float(nn.functional.cross_entropy(net(found.x), found.y).detach()))
    assert losses[1] < 0.7 * losses[0]
    assert not any(module.training for module in net.modules())


def test_weight_decay_shrinks_weights_and_spares_batch_norm():
    found = images((3, 32, 32), num=16)
    free, decayed = (make_resnet(0, blocks=1, width=2) for _ in range(2))
    for net, precision in ((free, 0.0), (decayed, 160.0)):
        train(net, found.x, 0 * found.y, Recipe(epochs=1, batch=16, step_size=0.1, precision=precision))
    for (name, a), b in zip(free.named_parameters(), decayed.parameters(), strict=True):
        # One step of Nesterov's SGD: the decay of a weight w moves it by 0.1 * 1.9 * 10 w.
        before = dict(make_resnet(0, blocks=1, width=2).named_parameters())[name]
        spared = before.dim() == 1 and not name.endswith("bias") or "norm" in name or name.startswith("1.")
        expected = a if spared else a - 1.9 * before
        assert torch.allclose(b, expected, atol=1e-10), name


def check(record: dict[str, Any]) -> None:
    assert record.get("failed") is None
    assert 0 <= record["scores"]["ece"] <= 1
    assert set(record["auroc"]) == {"notmnist"}
    assert all(0 <= value <= 1 for value in record["auroc"]["notmnist"].values())
    assert record["milliseconds_per_image"] > 0
    assert record["environment"]["versions"]["torch"]


def test_a_record_has_scores_cost_and_settings(of_lenet):
    for record in of_lenet.values():
        check(record)
    assert of_lenet["map"]["settings"].startswith("MAP(")
    assert "num_steps=5," in of_lenet["map"]["settings"]
    assert of_lenet["kronecker_tuned"]["seconds"]["prior"] > 0
    assert of_lenet["kronecker_tuned_probit"]["link"] == "probit"


@pytest.mark.slow
def test_the_costly_rows_have_scores_cost_and_settings_too():
    found = records_of(COSTLY)
    for record in found.values():
        check(record)
    assert found["last_layer_tuned"]["parameters"] == 850
    assert found["sampled_em"]["extra"]["prior_precision"] != found["sampled"]["extra"]["prior_precision"]
    assert set(found["sampled_em"]["extra"]["prior_precision"]) == {
        f"{layer}.{kind}" for layer in (0, 3, 7, 9, 11) for kind in ("weight", "bias")
    }


def test_the_scores_of_the_mode_are_those_of_the_network_itself():
    found = images((1, 28, 28))
    net = lenet(0)
    target = compile_target(outside.model_of(net), found.x, found.y)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    posterior = DrawsPosterior(target, theta[None, None], backend=MAP())
    record = records.scored(records.Fitted(posterior, {}), found)
    with torch.no_grad():
        logits = net(found.x_test)
    assert record["scores"]["nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, found.y_test)), rel=1e-8)
    assert record["scores"]["accuracy"] == float((logits.argmax(1) == found.y_test).double().mean())


def test_members_of_the_ensemble_start_apart():
    found = images((1, 28, 28))
    posterior = outside.Trial(found, outside.Sizes(steps=1, batch=24), 0).fit("ensemble").posterior
    members = posterior.draws[0, :, -10:]  # the offsets of the last layer
    assert torch.pdist(members).min() > 0.1


def test_foreign_images_are_standardised_like_the_training_images():
    data, other = load("yacht"), load("yacht", split=1)
    rows = outside.restandardised(other, data)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    expected = (other.inputs_original(other.x_test) - data.x_mean) / data.x_std
    assert torch.equal(rows, expected[order])
    assert not torch.allclose(rows, other.x_test[order])


def test_prior_draws_determine_nothing_and_no_spread_determines_every_weight():
    found = images((1, 28, 28), num=2)
    target = compile_target(outside.model_of(lenet(0)), found.x, found.y)
    precision = torch.full((target.dim,), 4.0)
    for deviation, expected in ((0.5, 0.0), (0.0, target.dim)):
        draws = torch.full((3, target.dim), deviation)
        posterior = LinearisedDrawsPosterior(
            target, torch.zeros(target.dim), draws, backend=MAP(), prior_precision=precision
        )
        assert records.determined(posterior)["determined"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_draws_of_the_resnet_have_the_prior_that_the_evidence_chose(of_resnet):
    _, found = of_resnet
    assert [row for row, record in found.items() if "failed" in record] == []
    chosen = found["kronecker_tuned"]["extra"]["prior_precision"]["all"]
    assert found["sampled"]["extra"]["prior_precision"]["all"] == pytest.approx(chosen)
    assert chosen != resnet.Options.precision
    assert found["sampled"]["extra"]["passes_of_descent"] == 2 * 6 / 24
    assert found["sampled"]["process_peak_mib"] > 0
    norms = sum(
        p.numel() for m in make_resnet(0, 1, 2).modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    )
    assert found["map"]["parameters"] == sum(p.numel() for p in make_resnet(0, 1, 2).parameters()) - norms


@pytest.mark.slow
def test_a_record_that_exists_is_kept_and_kept_weights_are_taken(of_resnet):
    torch.set_default_dtype(torch.float32)  # as where the records were made
    folder, found = of_resnet
    path = folder / "resnet-0-map.json"
    path.write_text(json.dumps(found["map"] | {"seed": 77}))
    options = resnet.Options(epochs=1, blocks=1, width=2, weights=folder / "weights.pt")
    trial = resnet.Trial(images((3, 32, 32)), options, folder)
    keep(path, lambda: trial.record("map"))
    assert json.loads(path.read_text())["seed"] == 77
    path.unlink()
    keep(path, lambda: trial.record("map"))
    assert json.loads(path.read_text())["scores"] == found["map"]["scores"]
    assert not list(folder.glob("*.unfinished"))


def test_a_row_that_fails_is_a_record_with_its_message():
    def fit(row: str) -> records.Fitted:
        raise MemoryError(f"no room for {row}")

    record = records.run("outside", "sampled", images((1, 28, 28)), 0, fit)
    assert record["failed"] == "MemoryError: no room for sampled"
    assert "scores" not in record
    text = page.render([record])
    assert "- outside, mnist, seed 0, sampled Laplace: MemoryError: no room for sampled" in text


def test_the_page_says_in_which_figures_a_row_is_worse_than_the_mode(of_lenet):
    mode = json.loads(json.dumps(of_lenet["map"]))
    other = mode | {"row": "ensemble", "scores": mode["scores"] | {"nll": mode["scores"]["nll"] + 0.25}}
    other["auroc"] = {"notmnist": {"entropy": mode["auroc"]["notmnist"]["entropy"] + 0.125, "max_prob": 0.5}}
    text = page.render([mode, other])
    assert "- ensemble of 5, beside MAP: **better** in AUROC notMNIST by 0.125; **worse** in NLL by 0.250;" in text
    assert "**equal** in ECE." in text


def test_the_page_averages_seeds_with_their_standard_error(of_lenet):
    first = of_lenet["map"] | {"scores": of_lenet["map"]["scores"] | {"nll": 1.0}}
    second = first | {"seed": 1, "scores": first["scores"] | {"nll": 0.8}}
    assert "| 0.9000 ± 0.1000 |" in page.render([first, second])


def test_the_page_states_what_the_draws_of_the_resnet_cost(of_lenet):
    mode = of_lenet["map"] | {"study": "resnet", "data": "cifar10", "sizes": {"epochs": 1, "draws": 3}}
    costly = mode | {
        "row": "sampled",
        "seconds": {"network": 1.0, "fit": 90.0, "fit_processor": 60.0},
        "sizes": {"epochs": 1, "draws": 3, "steps": 2, "batch": 6},
        "extra": {"passes_of_descent": 0.5, "determined": 30.0, "determined_error": 20.0},
        "parameters": 2**20,
        "peak_mib": 128.0,
        "process_peak_mib": 512.0,
    }
    text = page.render([mode, costly])
    assert "The 3 draws took 1.5 minutes (1.0 minutes of the processor's time) on 1 thread and 128 MiB above" in text
    assert "at most 512 MiB); the draws themselves are 12 MiB. 2 steps of 6 images went over the data 0.5 times" in text
    assert "## ResNet-20 on CIFAR-10" in text
    assert "these draws cannot be told from draws of the prior" in text
    moved = costly | {"extra": costly["extra"] | {"determined": 50.0}}
    assert "these draws cannot be told" not in page.render([mode, moved])


def test_the_page_says_when_draws_spread_wider_than_the_prior(of_lenet):
    extra = {"determined": -50.0, "determined_error": 20.0}
    sampled = of_lenet["map"] | {"row": "sampled", "extra": extra}
    assert "**sampled Laplace: failed without a warning.**" in page.render([of_lenet["map"], sampled])
    sampled["extra"] = extra | {"determined": -30.0}
    assert "failed without a warning" not in page.render([of_lenet["map"], sampled])


def test_unknown_rows_and_an_empty_folder_are_refused(tmp_path, capsys):
    for main, arguments, message in (
        (outside.main, ["--rows", "map,mapp"], "expected some of map, kronecker"),
        (resnet.main, ["--rows", "map,mapp"], "expected some of map, kronecker_tuned, sampled, got mapp"),
        (page.main, ["--results", str(tmp_path)], "run `python -m benchmarks.images.outside` first"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
