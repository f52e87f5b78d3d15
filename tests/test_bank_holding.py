"""What a bank holds: names, refusals, parked adapters, and many threads at once."""

import copy
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import TOLERANCE, answers, difference, held_to, trained
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support import CONFIGS, enliven, family, fitted, images, logits
from torch import Tensor

from visgraft import Adapted, Bank, save
from visgraft.core.attached import get_attached
from visgraft.errors import AdapterError, DataError, VisgraftError


def test_a_name_is_replaced_only_when_told_so() -> None:
    bank, first, second = Bank(family("plain")), trained("lora-0", seed=1), trained("sct-0", seed=2)
    bank.add("a", first)
    with pytest.raises(VisgraftError, match="'a' already; pass replace=True"):
        bank.add("a", second)
    held_to(bank, {"a": first}, images(1), ["a"])
    bank.add("a", second, replace=True)
    held_to(bank, {"a": second}, images(1), ["a"])
    bank.add("b", first)
    assert bank.names == ("a", "b") and len(bank) == 2 and "b" in bank and "c" not in bank
    bank.remove("a")
    assert bank.names == ("b",)
    for act in (lambda: bank.remove("a"), lambda: bank(images(2), ["b", "a"]), lambda: bank.record("a")):
        with pytest.raises(VisgraftError, match="no adapter 'a'"):
            act()
    with pytest.raises(VisgraftError, match="as many names"):
        bank(images(2), ["b"])
    with pytest.raises(VisgraftError, match="not empty"):
        bank.add("", first)
    with pytest.raises(DataError, match="must be \\[channels, height, width\\]"):
        bank([images(1)], ["b"])
    assert bank(images(1)[:0], []) == []


def test_the_bank_leaves_backbone_and_models_as_they_are() -> None:
    plain, model = family("plain"), trained("bitfit-0")
    state, flags = copy.deepcopy(plain.state_dict()), [p.requires_grad for p in plain.parameters()]
    places = [p.data_ptr() for p in plain.parameters()]
    bank = Bank(plain)
    for name in ("bitfit-0", "full-0", "lora-0", "vpt_deep-0"):
        bank.add(name, trained(name))
    given = copy.deepcopy(model.state_dict())
    bank.add("model", model)
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    bank(images(5), list(bank.names))
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert [p.requires_grad for p in plain.parameters()] == flags
    assert [p.data_ptr() for p in plain.parameters()] == places
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    before = answers(bank, images(1), ["model"])[0]
    enliven(model, 9)
    assert torch.equal(answers(bank, images(1), ["model"])[0], before), "what was added is copied"
    assert bank.memory().backbone == sum(t.nbytes for t in plain.state_dict(keep_vars=True).values())


def test_a_backbone_that_is_none_is_refused() -> None:
    with pytest.raises(VisgraftError, match=r"call visgraft\.detach first"):
        Bank(trained("lora-0"))
    with pytest.raises(VisgraftError, match="holds no data"):
        Bank(family("plain").to("meta"))
    with pytest.raises(VisgraftError, match="capacity is 0"):
        Bank(family("plain"), capacity=0)


def spoil_tensors(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["head.bias"][0] = float("nan")
    save_file(tensors, file)


def move_tensors(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor + 0.3 for name, tensor in load_file(file).items()}, file)


def cut_tensors(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def rename_tensors(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({f"{name}x": tensor for name, tensor in load_file(file).items()}, file)


def change_config(folder: Path) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["method_config"]["rank"] = 3
    file.write_text(json.dumps(config))


def lose_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


DAMAGE = {
    spoil_tensors: "head.bias is not finite",
    cut_tensors: "damaged",
    rename_tensors: "does not fit its config",
    change_config: "does not fit its config",
    lose_config: "is not an adapter",
    move_tensors: "seeded picture otherwise",
}


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
def test_a_damaged_adapter_leaves_the_bank_as_it_was(harm: Any, tmp_path: Path) -> None:
    good = trained("lora-0", seed=1)
    bank = Bank(family("plain"))
    bank.add("good", save(good, tmp_path / "good"))
    bad = save(trained("lora-0", seed=2), tmp_path / "bad")
    before = bank.names, bank.memory()
    harm(bad)
    for name, replace in (("bad", False), ("good", True)):
        with pytest.raises(AdapterError, match=DAMAGE[harm]):
            bank.add(name, bad, replace=replace)
        assert (bank.names, bank.memory()) == before
        held_to(bank, {"good": good}, images(1), ["good"])


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    bank = Bank(family("plain", seed=1))
    other = trained("lora-0")
    for given in (other, Adapted.of(other), save(other, tmp_path / "other")):
        with pytest.raises(AdapterError, match="trained on another backbone"):
            bank.add("other", given)
    with pytest.raises(AdapterError, match="another backbone than the bank's"):
        bank.add("swin", trained("lora-0", "swin"))
    large = fitted(CONFIGS["lora-0"], "plain", img_size=24)
    for given in (large, save(large, tmp_path / "large")):
        with pytest.raises(AdapterError, match="24 × 24 pixels"):
            bank.add("large", given)
    with pytest.raises(VisgraftError, match="nothing is attached"):
        bank.add("plain", family("plain"))
    with pytest.raises(VisgraftError, match="this is int"):
        bank.add("number", 3)  # type: ignore[arg-type]
    assert len(bank) == 0


def test_the_last_used_adapters_stay_and_the_others_come_back(tmp_path: Path) -> None:
    bank, models = Bank(family("plain"), capacity=2), {}
    for number, name in enumerate(("lora-0", "sct-0", "bitfit-0", "full-0", "lora-0")):
        models[str(number)] = trained(name, seed=number)
        bank.add(str(number), models[str(number)])
    every = list(bank.names)
    size = {}
    for name, model in models.items():
        alone = Bank(family("plain"))
        alone.add(name, model)
        size[name] = sum(alone.memory()[1:])
        assert size[name] <= 1.3 * sum(t.nbytes for t in get_attached(model).stored().values()) + 500
    taken = bank.memory()
    assert taken.adapters + taken.heads == size["3"] + size["4"], "those added last"
    assert taken.parked == size["0"] + size["1"] + size["2"]
    for _ in range(2):
        held_to(bank, models, images(5), every)  # more than there is room for
    held_to(bank, models, images(2), ["1", "0"])
    taken = bank.memory()
    assert taken.adapters + taken.heads == size["0"] + size["1"]
    folder = Path(bank._shelf._folder.name)  # type: ignore[union-attr]
    assert len(list(folder.iterdir())) == 5
    for name in every:
        bank.remove(name)
    assert list(folder.iterdir()) == [] and bank.memory()[1:] == (0, 0, 0)
    del bank
    assert not folder.exists()


def test_an_opened_adapter_may_be_parked_before_it_is_held() -> None:
    bank, models = Bank(family("plain"), capacity=1), {"0": trained("lora-0"), "1": trained("sct-0")}
    bank.add("0", models["0"])
    opened = bank.open("1", models["1"])
    bank(images(1), [opened])
    held_to(bank, models, images(1), ["0"])
    assert opened.held.here is None, "it had to make room"
    bank.put(opened)
    held_to(bank, models, images(2), ["1", "0"])


def test_where_nothing_can_be_parked_all_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, models = (
        Bank(family("plain"), capacity=1),
        {str(number): trained("lora-0", seed=number) for number in range(3)},
    )

    def full(tensors: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        for name, model in models.items():
            bank.add(name, model)
        held_to(bank, models, images(3), ["0", "1", "2"])
        assert bank.memory().parked == 0
    held_to(bank, models, images(3), ["0", "1", "2"])
    assert bank.memory().parked, "as soon as there is room again"


def test_an_error_in_a_forward_leaves_the_bank_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, models = Bank(family("plain")), {"a": trained("lora-0"), "b": trained("convpass-0")}
    block = type(models["a"].blocks[0].attn)
    for name, model in models.items():
        bank.add(name, model)
    for names in (["a", "a"], ["a", "b"]):
        with pytest.raises(DataError, match="20 × 20 pixels"):
            bank(images(2, size=20), names)
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(block, "forward", out_of_memory)
            bank(images(2), names)
        held_to(bank, models, images(2), names)


def out_of_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_a_call_answers_with_the_adapters_that_were_there_when_it_began() -> None:
    bank, versions = Bank(family("plain")), [trained("lora-0", seed=1), trained("sct-0", seed=2, outputs=3)]
    bank.add("a", versions[0])

    class Names(list[str]):
        def __iter__(self) -> Any:
            yield "a"
            bank.add("a", versions[1], replace=True)
            yield "a"

    first = answers(bank, images(2), Names(["a", "a"]))
    assert difference(torch.stack(first), logits(versions[0], images(2))) <= TOLERANCE
    held_to(bank, {"a": versions[1]}, images(2), ["a", "a"])


class Asking:
    """Threads that ask a bank for answers until told to stop, and note what is wrong."""

    def __init__(self, bank: Bank, right: dict[str, list[Tensor]], x: Tensor, threads: int) -> None:
        self.bank, self.right, self.x, self.wrong, self.stopped = bank, right, x, list[str](), threading.Event()
        self.calls = 0
        self.threads = [threading.Thread(target=self.ask, args=(seed,)) for seed in range(threads)]

    def __enter__(self) -> "Asking":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def ask(self, seed: int) -> None:
        draw, count = random.Random(seed), 0
        try:
            while not self.stopped.is_set() or count < 5:
                names, count = draw.choices([*self.right], k=len(self.x)), count + 1
                self.check(names, answers(self.bank, self.x, names))
                self.calls += 1
        except Exception as error:
            self.wrong.append(f"{seed}: {error!r}")

    def check(self, names: list[str], found: list[Tensor]) -> None:
        for row, (name, one) in enumerate(zip(names, found, strict=True)):
            fits = [e for e in self.right[name] if e[row].shape == one.shape]
            assert any(difference(one, e[row]) <= TOLERANCE for e in fits), name
        assert len({len(one) for name, one in zip(names, found, strict=True) if name == "changing"}) <= 1, "versions"


@pytest.mark.parametrize("capacity", [None, 3])
def test_adding_and_removing_change_no_answer_of_eight_threads(capacity: int | None) -> None:
    bank, x = Bank(family("plain"), capacity=capacity), images(6)
    models = {name: trained(name) for name in ("lora-0", "sct-0", "bitfit-0", "convpass-0")}
    for name, model in models.items():
        bank.add(name, model)
    versions = [trained("lora-0", seed=20), trained("sct-0", seed=21, outputs=3)]
    bank.add("changing", versions[0])
    right = {name: [logits(model, x)] for name, model in models.items()}
    right["changing"] = [logits(model, x) for model in versions]
    with Asking(bank, right, x, threads=8) as asking:
        for round_ in range(12):
            bank.add("changing", versions[round_ % 2], replace=True)
            bank.add(f"passing {round_}", versions[0])
            if round_ > 3:
                bank.remove(f"passing {round_ - 3}")
    assert asking.wrong == [] and asking.calls >= 40
