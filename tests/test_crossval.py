"""Cross-validation: every image is held out once per repeat, groups stay together, and the intervals are honest."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from support import CLASSES, CONFIGS, logits, vit
from torch import Tensor

from visgraft import Backbone, TrainConfig, list_methods
from visgraft.data.dataset import Dataset, Example
from visgraft.data.images import Images, Loading
from visgraft.errors import DataError, TrainingDiverged
from visgraft.measure.intervals import bootstrap, clusters, paired_difference, rate_interval, wilson
from visgraft.training.crossval import Bench, Predictions, fit_fold, folds, join, possible_folds, select
from visgraft.training.folds import cross_validate

HALF = (0.5, 0.5, 0.5)
RECIPE = TrainConfig(epochs=2, warmup_epochs=0.0, batch_size=8, lr=5e-3, precision="fp32")


def examples(counts: list[int], groups: int = 0) -> list[Example]:
    """So many images of each class; with `groups`, in that many groups per class."""
    return [
        Example(Path(f"root/c{label}/{i}.png"), label, f"{label}-{i % groups}" if groups else None)
        for label, count in enumerate(counts)
        for i in range(count)
    ]


def task(count: int = 20, seed: int = 0) -> Images:
    """Noise with the class in its brightness."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 100, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return Images((noise + 30 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, HALF, HALF)


def bench() -> Bench:
    """A bench around the tiny ViT of the laws."""
    made = Bench(Backbone("none"), CLASSES)
    made._models |= {0.0: vit(), 0.1: vit("drop_path")}
    return made


def test_each_repeat_holds_every_image_out_once_and_keeps_the_classes_shares() -> None:
    cases = examples([20, 10, 5])
    found = folds(cases, 5, 3, seed=1)
    assert len(found) == 15
    for repeat in range(3):
        parts = found[5 * repeat : 5 * repeat + 5]
        assert sorted(np.concatenate([held_out for _, held_out in parts])) == list(range(35))
        for learned, held_out in parts:
            assert not set(learned) & set(held_out) and len(learned) + len(held_out) == 35
            assert Counter(cases[i].label for i in held_out) == {0: 4, 1: 2, 2: 1}
    assert not np.array_equal(found[0][1], found[5][1]), "repeats differ"
    again, other = folds(cases, 5, 3, seed=1), folds(cases, 5, 3, seed=2)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(found, again, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(found, other, strict=True))


def test_images_of_a_group_are_held_out_together() -> None:
    cases = examples([20, 20], groups=5)
    found = folds(cases, 5, 2)
    for learned, held_out in found:
        assert not {cases[i].group for i in learned} & {cases[i].group for i in held_out}
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(found[:5], found[5:], strict=True))
    assert sorted(np.concatenate([held_out for _, held_out in found[5:]])) == list(range(40))


def test_images_with_any_number_of_classes_are_divided_too() -> None:
    cases = [Example(Path(f"{i}.png"), (0, 1) if i % 3 else ()) for i in range(11)]
    found = folds(cases, 3, 1)
    assert sorted(np.concatenate([held_out for _, held_out in found])) == list(range(11))


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        (examples([9, 3, 4]), "5 folds need 5 images of each class, but some have fewer: c1 (3), c2 (4); take fewer"),
        (examples([9, 9], groups=3), "5 folds need 5 groups of each class"),
    ],
)
def test_a_class_too_small_for_the_folds_is_one_clear_line(cases: list[Example], said: str) -> None:
    with pytest.raises(DataError, match=r"take fewer folds") as error:
        folds(cases)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_folds_and_repeats_must_divide_something() -> None:
    for wrong in ({"folds": 1}, {"repeats": 0}):
        with pytest.raises(DataError, match="no cross-validation"):
            folds(examples([9, 9]), **wrong)


def test_as_many_folds_are_possible_as_the_rarest_class_allows() -> None:
    assert possible_folds(examples([9, 9])) == 5
    assert possible_folds(examples([9, 3])) == 3
    assert possible_folds(examples([9, 9], groups=2)) == 2
    assert possible_folds([Example(Path("a"), ()), Example(Path("b"), (1,))]) == 2


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if not config.passes])
def test_after_a_training_the_backbone_and_its_head_are_what_they_were_bit_for_bit(name: str) -> None:
    ground, config = bench(), CONFIGS[name]
    drop_path = list_methods()[config.method].recipe.drop_path
    model: Any = ground.model(drop_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    answers, flags = logits(model), [p.requires_grad for p in model.parameters()]
    fit = ground.fit(config, replace(RECIPE, drop_path=drop_path), task(), task(10, 1))
    assert not torch.equal(fit.probabilities, logits(model, select(task(10, 1), np.arange(10)).normalised(
        task(10, 1).pixels[:])).softmax(-1)), "it did train"  # fmt: skip
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), answers) and [p.requires_grad for p in model.parameters()] == flags


def test_a_training_that_is_broken_off_leaves_the_backbone_clean() -> None:
    ground = bench()
    answers = logits(ground.model())

    def stop(epoch: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ground.fit(CONFIGS["alore-0"], RECIPE, task(), task(10, 1), on_progress=stop)
    assert torch.equal(logits(ground.model()), answers)
    ground.fit(CONFIGS["sct-0"], RECIPE, task(), task(10, 1))


def test_two_trainings_on_one_bench_are_alike_whatever_was_trained_between() -> None:
    ground = bench()
    first = ground.fit(CONFIGS["lora-0"], RECIPE, task(), task(10, 1))
    ground.fit(CONFIGS["sct-0"], RECIPE, task(), task(10, 1))
    assert torch.equal(ground.fit(CONFIGS["lora-0"], RECIPE, task(), task(10, 1)).probabilities, first.probabilities)
    assert first.parameters > 0 and not first.head_only


def test_a_diverging_training_raises_unless_its_last_good_state_will_do() -> None:
    ground, hot = bench(), replace(RECIPE, lr=1e30, head_lr=1e30)
    with pytest.raises(TrainingDiverged):
        ground.fit(CONFIGS["full-0"], replace(hot, drop_path=0.1), task(), task(10, 1))
    kept = ground.fit(CONFIGS["full-0"], replace(hot, drop_path=0.1), task(), task(10, 1), keep_last_good=True)
    assert kept.training is None and bool(kept.probabilities.isfinite().all())


def test_what_a_fold_learns_never_holds_what_it_is_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, seen = task(30), list[tuple[Tensor, Tensor]]()
    fit = Bench.fit

    def watch(self: Bench, method: Any, config: Any, learned: Images, held_out: Images, **options: Any) -> Any:
        seen.append((learned.pixels[:], held_out.pixels[:]))
        return fit(self, method, config, learned, held_out, **options)

    monkeypatch.setattr(Bench, "fit", watch)
    parts = folds(examples([6] * CLASSES), 3, 1)
    order = torch.tensor([label + CLASSES * i for label in range(CLASSES) for i in range(6)])
    pictures = select(pictures, order.numpy())
    fits = [fit_fold(bench(), CONFIGS["linear-0"], RECIPE, pictures, part) for part in parts]
    assert len(seen) == len(fits) == 3
    for learned, held_out in seen:
        assert not any(torch.equal(one, other) for one in learned for other in held_out)
    for fitted, (_, held_out) in zip(fits, parts, strict=True):
        assert torch.allclose(fitted.probabilities.sum(-1), torch.ones(len(held_out)))
        assert torch.equal(fitted.labels, pictures.labels[torch.from_numpy(held_out)])


def test_known_features_give_a_head_the_same_answers() -> None:
    pictures, parts = task(30), folds([Example(Path(f"{i}"), i % CLASSES) for i in range(30)], 3, 1)
    ground, known = bench(), dict[str, Tensor]()
    ground.fit(CONFIGS["linear-0"], RECIPE, pictures, pictures, features=known)
    for part in parts:
        plain = fit_fold(ground, CONFIGS["linear-0"], RECIPE, pictures, part)
        quick = fit_fold(ground, CONFIGS["linear-0"], RECIPE, pictures, part, features=known["train"])
        assert torch.allclose(plain.probabilities, quick.probabilities, atol=1e-5)


def test_images_are_selected_and_joined_with_all_that_belongs_to_them() -> None:
    whole = replace(task(6), paths=tuple(Path(str(i)) for i in range(6)), groups=tuple("aabbcc"))
    part = select(whole, np.array([4, 1]))
    assert part.paths == (Path("4"), Path("1")) and part.groups == ("c", "a")
    assert torch.equal(part.pixels[0], whole.pixels[4]) and part.labels.tolist() == [4, 1]
    both = join(part, whole)
    assert len(both) == len(both.pixels) == len(both.paths) == len(both.groups) == 8


def test_figures_are_means_over_the_repeats_and_the_interval_is_over_images() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    always, never = torch.eye(2)[labels], 1 - torch.eye(2)[labels]
    found = Predictions(torch.stack([always, never]), labels)
    assert found.figure == 0.5 and found.right.tolist() == [0.5] * 4
    assert found.interval == pytest.approx(wilson(0.5, 4)), "two repeats are not eight images"
    assert Predictions(always[None], labels).macro_f1 == 1.0


def test_several_classes_per_image_are_measured_by_average_precision() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]] * 5)
    good = Predictions((0.9 * labels + 0.05)[None], labels)
    assert good.multi_label and good.figure == 1.0 and good.interval == (1.0, 1.0)
    noise = Predictions(torch.rand(1, 20, 2, generator=torch.Generator().manual_seed(0)), labels)
    low, high = noise.interval
    assert low < noise.figure < high


@pytest.mark.parametrize(("right", "count"), [(0, 9), (7, 9), (9, 9), (150, 400)])
def test_wilsons_interval_is_scipys(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high))
    answers = np.repeat([1.0, 0.0], [right, count - right])
    assert rate_interval(answers, clusters((), count)) == pytest.approx((expected.low, expected.high))


def test_images_that_go_together_widen_the_interval() -> None:
    right = np.repeat([1.0, 0.0, 1.0, 1.0], 10)  # four patients, each answered alike
    alone = rate_interval(right, clusters((), 40))
    together = rate_interval(right, np.repeat(np.arange(4), 10))
    assert together[0] < alone[0] and together[1] > alone[1]
    assert rate_interval(np.ones(40), np.repeat(np.arange(4), 10)) == pytest.approx(wilson(1.0, 4))
    assert clusters(("a", None, "a", None), 4).tolist().count(clusters(("a", None, "a", None), 4)[0]) == 2


def test_a_paired_difference_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    for count, together in ((60, 1), (200, 4)):
        hits = 0
        for _ in range(400):
            hard = np.repeat(generator.random(count // together), together)
            first, second = (hard + 0.1 * generator.normal(size=count) < p for p in (0.8, 0.7))
            # nearly: `hard` is uniform, so the thresholds are the rates
            measured = paired_difference(first.astype(float), second.astype(float), np.arange(count) // together)
            hits += abs(measured.mean - 0.1) <= measured.half_width
        assert 0.91 <= hits / 400 <= 0.99


def test_agreement_on_few_images_is_no_certainty() -> None:
    nobody_differs = paired_difference(np.ones(20), np.ones(20), np.arange(20))
    assert nobody_differs.mean == 0 and 0.05 < nobody_differs.half_width < 0.15 and not nobody_differs.clear
    assert paired_difference(np.ones(50), np.zeros(50), np.arange(50)).clear


def test_the_bootstrap_draws_whole_groups() -> None:
    members = np.array([1, 0, 1, 0, 2])
    drawn = list[set[int]]()
    bootstrap(lambda chosen: float(drawn.append(set(chosen.tolist())) is None), members)
    assert len(drawn) > 100
    assert all(({0, 2} <= one or not {0, 2} & one) and ({1, 3} <= one or not {1, 3} & one) for one in drawn)


def test_cross_validation_reads_no_test_image_and_gives_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    parts: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 80, (24, 40, 40, 3))):
        part = "test" if number >= 18 else "val" if number >= 12 else "train"
        path = tmp_path / f"{number}.png"
        if part != "test":
            Image.fromarray((pixels + 90 * (number % 3)).clip(0, 255).astype(np.uint8)).save(path)
        parts[part].append(Example(path, number % 3))
    (tmp_path / "5.png").write_text("no image")
    data = Dataset(tmp_path, ("a", "b", "c"), *(tuple(p) for p in parts.values()), "split", "", None)
    found = cross_validate(
        data,
        backbone=Backbone("test_vit", "none", 32),
        method_config=list_methods()["linear"].Config(),
        train_config=replace(list_methods()["linear"].recipe, epochs=30, warmup_epochs=1.0, precision="fp32"),
        folds=3,
        loading=Loading(skip_broken=True),
    )
    written = found.to_dict()
    assert (found.images, found.folds, found.repeats) == (17, 3, 2), "one does not decode"
    assert np.shape(found.fold_figures) == (2, 3)
    assert found.fold_spread == pytest.approx(np.std(found.fold_figures, ddof=1))
    assert found.figure > 0.8 and found.interval[0] < found.figure <= found.interval[1]
    assert written["measure"] == "top1" and "predictions" not in written
