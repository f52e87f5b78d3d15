"""What the report computes: comparisons, rows, calibration, channels, parts, mistakes and heat maps."""

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import CLASSES, batches, fitted, images, logits, vit

from visgraft import ALoREConfig, LinearConfig, MethodConfig, SCTConfig, detach, list_methods, merge
from visgraft.core.attached import get_attached
from visgraft.core.method import Grid
from visgraft.core.tensors import CHILD
from visgraft.data.images import Images
from visgraft.measure.calibration import calibration
from visgraft.measure.evaluation import confusion, score
from visgraft.methods.salience import salient_channels
from visgraft.pictures import heat_map
from visgraft.report import channels, compare, tables
from visgraft.report.figures import curves
from visgraft.report.looking import occlusion
from visgraft.report.mistakes import find_mistakes
from visgraft.report.parts import entering, keep_parts, show_parts


def measured(probabilities: list[list[float]], labels: list[Any]) -> Any:
    return score(torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels))


def answers(right: int, count: int) -> Any:
    """An evaluation of two classes in which the first `right` of `count` images are answered right."""
    return measured([[0.9, 0.1]] * right + [[0.2, 0.8]] * (count - right), [0] * count)


def alone(count: int) -> np.ndarray:
    return np.arange(count)


def test_a_lead_is_certain_only_where_the_paired_interval_says_so() -> None:
    clear = compare.paired_difference(answers(95, 100), answers(50, 100), alone(100))
    assert clear.points == pytest.approx(0.45) and clear.certain and clear.low < 0.45 < clear.high
    assert not compare.paired_difference(answers(51, 100), answers(50, 100), alone(100)).certain
    same = compare.paired_difference(answers(50, 100), answers(50, 100), alone(100))
    assert same.points == 0 and same.low < 0 < same.high
    grouped = compare.paired_difference(answers(95, 100), answers(50, 100), alone(100) // 25)
    assert grouped.high - grouped.low > 2 * (clear.high - clear.low)


def test_the_verdict_says_whether_the_lead_is_certain() -> None:
    record: Any = SimpleNamespace(facts={}, figures={}, parameters={}, method=LinearConfig())
    evaluations = [answers(95, 100), answers(50, 100), answers(94, 100)]
    here = Path(__file__).parent
    rows = [compare.make_row(n, n, here, record, e, alone(100)) for n, e in zip("abc", evaluations, strict=True)]

    def told(*chosen: int) -> str:
        gaps = [compare.paired_difference(evaluations[0], evaluations[i], alone(100)) for i in chosen]
        return compare.verdict([rows[i] for i in chosen], "top-1", [None, *gaps[1:]], "validation")

    assert "45.0 points ahead of b" in told(0, 1) and told(0, 1).endswith("the lead is more than chance.")
    assert "1.0 points ahead of c" in told(0, 2) and "includes zero" in told(0, 2)
    assert told(0).endswith("(95 % interval 88.8 to 97.8).")


def test_class_rows_are_those_of_the_confusion_matrix_worst_first() -> None:
    labels = [0, 0, 0, 1, 1, 1, 1, 2]
    given = [0, 1, 1, 1, 1, 1, 0, 2]
    found = measured([[float(i == answer) for i in range(4)] for answer in given], labels)
    rows = tables.class_rows(found, confusion(found, 4), list("abcd"))
    assert [(row.name, row.images, row.wrong, row.wrong_count) for row in rows] == [
        ("a", 3, "b", 2), ("b", 4, "a", 1), ("c", 1, "", 0), ("d", 0, "", 0)
    ]  # fmt: skip
    assert (rows[0].recall, rows[0].precision) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert (rows[3].recall, rows[3].f1) == (None, None)
    pairs = tables.confused_pairs(confusion(found, 4), list("abcd"))
    assert [(p.true, p.answered, p.count) for p in pairs] == [("a", "b", 2), ("b", "a", 1)]
    assert pairs[0].share == pytest.approx(2 / 3)


def test_group_rows_are_worst_first_and_absent_without_groups() -> None:
    found = answers(6, 8)
    assert tables.group_rows(found, [None] * 8) == []
    rows = tables.group_rows(found, ["a"] * 4 + ["b"] * 3 + [None])
    assert [(row.name, row.images, row.right) for row in rows] == [("no group", 1, 0), ("b", 3, 2), ("a", 4, 4)]
    assert all(row.low <= row.share <= row.high for row in rows)


def test_calibration_error_is_the_mean_distance_from_the_line() -> None:
    found = calibration(measured([[0.9, 0.1]] * 10, [0] * 9 + [1]))
    assert found.error == pytest.approx(0, abs=1e-12) and len(found.bins) == 1
    found = calibration(measured([[0.95, 0.05]] * 4 + [[0.4, 0.6]] * 4, [0, 0, 1, 1, 1, 1, 1, 1]))
    assert found.error == pytest.approx((0.45 + 0.4) / 2)
    assert [(b.count, b.accuracy) for b in found.bins] == [(4, 1.0), (4, 0.5)]
    several = calibration(measured([[0.95, 0.25]], [[1.0, 0.0]]))
    assert several.error == pytest.approx((0.05 + 0.25) / 2)


@pytest.mark.parametrize("options", [{}, {"mode": "mlp"}, {"mode": "qkv"}, {"score": "lowest"}, {"channels": 32}])
def test_the_salience_map_marks_exactly_the_modules_channels(options: dict[str, Any]) -> None:
    config = SCTConfig(**options)
    model = fitted(config)
    modules = [(key, module.index.clone()) for key, module in get_attached(model).positions.items()]
    found = channels.choices(model)
    assert sum(len(choice.marks) for choice in found) == len(modules)
    for choice in found:
        own = [index for key, index in modules if len(found) == 1 or choice.site.replace(".", "_") in key]
        for mark, index in zip(choice.marks, own, strict=True):
            assert np.flatnonzero(mark).tolist() == index.tolist()
        plain = vit()
        scores = channels.channel_scores(plain, batches(), choice)
        assert scores.shape == choice.marks.shape
        if config.score == "class_aware":
            expected = salient_channels(vit(), batches(), len(own[0]), choice.site)
            for row, index in zip(scores, expected, strict=True):
                assert set(np.argsort(-row)[: len(index)].tolist()) == set(index.tolist())
        pixels = channels.map_colours(scores, choice.marks).reshape(len(own), channels.ROW, -1, 4)
        orange = (np.abs(pixels[:, channels.ROW - channels.GAP - 1] - (*_rgb(channels.ORANGE), 1)) < 1e-9).all(-1)
        assert (orange == choice.marks).all()
        drawn = channels.channel_map(choice, scores)
        assert (drawn.chosen, drawn.width, drawn.blocks) == (len(own[0]), 32, 3)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_the_channels_are_ordered_by_how_often_they_are_chosen() -> None:
    marks = np.array([[True, False, True, False], [True, False, False, True]])
    scores = np.array([[1.0, 5.0, 2.0, 2.0], [1.0, 5.0, 2.0, 8.0]])
    assert channels.channel_order(marks, scores).tolist() == [0, 3, 2, 1]
    assert channels.held_shares(marks, scores).tolist() == [0.3, 9 / 16]


def made_of_parts() -> list[MethodConfig]:
    kinds = [kind for kind in list_methods().values() if hasattr(kind, "part_delta")]
    return [*(kind.Config() for kind in kinds), ALoREConfig(experts=2, rank=1)]


@pytest.mark.parametrize("config", made_of_parts(), ids=lambda config: config.method)
def test_the_parts_add_up_to_the_whole(config: MethodConfig) -> None:
    model = fitted(config).double().eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    for module in get_attached(model).positions.values():
        with torch.no_grad():
            parts = [module.part_delta(x, i) for i in range(module.parts)]
            assert all(part.abs().max() > 0 for part in parts)
            torch.testing.assert_close(sum(parts), module.delta(x, Grid(4, 4, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", made_of_parts(), ids=lambda config: config.method)
def test_a_part_alone_is_the_model_merged_with_the_others_at_zero(config: MethodConfig) -> None:
    model = fitted(config).double().eval()
    x, before = images(dtype=torch.float64), logits(model, images(dtype=torch.float64))
    seen = []
    for part in range(config.experts):
        plain, _ = merge(keep_parts(model, (part,)), x)
        alone_ = fitted(config).double().eval()
        for module in get_attached(alone_).positions.values():
            module.delta = lambda x, grid, module=module, part=part: module.part_delta(x, part)
            module.low_rank = lambda: None  # so that it runs in the form put in its place
        torch.testing.assert_close(logits(plain, x), logits(alone_, x), rtol=1e-9, atol=1e-9)
        seen.append(logits(plain, x))
    assert min((seen[0] - other).abs().max() for other in seen[1:]) > 1e-3
    nothing, _ = merge(keep_parts(model, ()), x)
    torch.testing.assert_close(logits(nothing, x), logits(without_modules(fitted(config).double()), x))
    assert torch.equal(logits(model, x), before)


def without_modules(model: Any) -> Any:
    """The backbone under the trained head, with those of its own tensors that trained."""
    attached = get_attached(model)
    trained = {name: tensor.clone() for name, tensor in attached.stored().items() if name in model.state_dict()}
    own = {name: tensor for name, tensor in trained.items() if not name.startswith(f"{CHILD}.")}
    detach(model).load_state_dict(own, strict=False)
    return model.eval()


def picture_set(count: int = 5, labels: Any = None) -> Images:
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % CLASSES if labels is None else labels
    return Images(pixels, labels, (0.5,) * 3, (0.5,) * 3, tuple(Path(f"{i}.png") for i in range(count)))


def test_what_enters_a_module_is_what_its_delta_was_computed_from() -> None:
    model, seen = fitted(ALoREConfig()), []
    module = get_attached(model).positions["1_mlp_in"]
    kept = module.delta
    module.delta = lambda x, grid: seen.append(x) or kept(x, grid)
    x = images(3)
    entered, grid = entering(model, module, x)
    assert torch.equal(entered, seen[0])
    assert grid == (4, 4, 1)
    assert not module._forward_pre_hooks


def test_the_parts_figures_run_from_none_to_all() -> None:
    model, pictures = fitted(ALoREConfig(experts=2)), picture_set(12)
    found = show_parts(model, pictures, "fp32")
    assert found is not None and found.merged
    with torch.no_grad():
        x = pictures.normalised(pictures.pixels)
        full = (logits(model, x).argmax(-1) == pictures.labels).double().mean().item()
        bare = (
            (logits(without_modules(fitted(ALoREConfig(experts=2))), x).argmax(-1) == pictures.labels).double().mean()
        )
    assert (found.all, found.none) == (pytest.approx(full), pytest.approx(bare.item()))
    assert [one.name for one in found.alone] == ["expert 1", "expert 2"]
    assert (found.alone[0].alone, found.alone[0].without) == (found.alone[1].without, found.alone[1].alone)
    assert (found.block, found.blocks, found.place, len(found.rows)) == (2, 3, "attn.in", 4)
    assert all(len(row.tiles) == 2 and 0 <= row.scale[0] < row.scale[1] for row in found.rows)
    assert show_parts(fitted(SCTConfig()), pictures, "fp32") is None


class Corner(torch.nn.Module):
    """Says class 1 the surer, the brighter the upper left corner is; no other place counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corner = self.weight * x[:, :, :4, :4].mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(corner), 3 * corner], dim=-1)


def test_the_occlusion_map_points_at_the_only_place_that_counts() -> None:
    pictures = picture_set(2, torch.tensor([0, 0]))
    pictures.pixels[0, :, :4, :4], pictures.pixels[1, :, :4, :4] = 255, 230
    drop = occlusion(Corner(), pictures, 0, label=1, cells=4)
    assert drop.argmax() == 0 and drop[0, 0] > 0.2 and drop.flatten()[1:].abs().max() < 1e-6
    found = score(torch.softmax(Corner()(pictures.normalised(pictures.pixels)), -1).detach(), pictures.labels)
    worst = find_mistakes(Corner(), pictures, found, ["dark", "bright"])
    assert [(m.file, m.true, m.answered) for m in worst] == [("0.png", "dark", "bright"), ("1.png", "dark", "bright")]
    assert (
        worst[0].probability > worst[1].probability > 0.5
        and worst[0].strongest == occlusion(Corner(), pictures, 0, 1).max()
    )


def test_a_multi_label_mistake_is_given_or_missed() -> None:
    pictures = picture_set(2, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    found = score(torch.tensor([[0.1, 0.99], [0.2, 0.9]]), pictures.labels)
    worst = find_mistakes(Corner(), pictures, found, ["dark", "bright"])
    assert [(m.file, m.answered, m.map is None) for m in worst] == [("0.png", "bright", False), ("1.png", "dark", True)]


def test_a_heat_map_is_grey_where_nothing_is_and_red_where_it_is_most() -> None:
    pixels = np.full((64, 64, 3), (20, 180, 90), np.uint8)
    heat = np.zeros((2, 2))
    heat[0, 0] = 1.0
    body = base64.b64decode(heat_map(pixels, heat, "a map").light.split(",")[1])
    shown = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)
    assert shown[2, 2, 0] - shown[2, 2, 1] > 80
    assert np.ptp(shown[-3, -3]) < 12


@pytest.mark.parametrize(
    ("kept", "marked"), [(3, 0), (2, 1)], ids=["the last epoch was kept", "an earlier epoch was kept"]
)
def test_the_epoch_kept_is_marked_where_it_is_not_the_last(kept: int, marked: int) -> None:
    history = [{"epoch": i, "loss": 1 / i, "top1": 0.5, "lr": 0.1, "val_loss": 1.0, "val_top1": 0.4} for i in (1, 2, 3)]
    for picture in curves(history, kept):
        svg = base64.b64decode(picture.light.split(",")[1]).decode()
        assert svg.count("<!-- kept epoch -->") == marked
    assert len(curves(history, kept)) == 3 and curves([], None) == []
