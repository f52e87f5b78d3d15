"""Protocols: the published counts, VTAB-1k's lists, splits that leak, and any folder."""

import os
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from protocol_tasks import names, opened, refused, task_of, write_image

from visgraft.bench.published import published_groups
from visgraft.bench.trial import split_digest
from visgraft.data.dataset import Example, Split
from visgraft.errors import DataError, VisgraftError
from visgraft.protocols import PROTOCOLS, get_protocol
from visgraft.protocols.domains import DOMAINS
from visgraft.protocols.few_shot import FEW_SHOT
from visgraft.protocols.fgvc import FGVC
from visgraft.protocols.folder import folder_protocol
from visgraft.protocols.opening import check_root, open_task
from visgraft.protocols.row import Parts
from visgraft.protocols.vtab import VTAB

VTAB_ROWS = """
cifar100 natural 100 10000; caltech101 natural 102 6084; dtd natural 47 1880; oxford_flowers102 natural 102 6149;
oxford_iiit_pet natural 37 3669; svhn natural 10 26032; sun397 natural 397 21750; patch_camelyon specialized 2 32768;
eurosat specialized 10 5400; resisc45 specialized 45 6300; diabetic_retinopathy specialized 5 42670;
clevr_count structured 8 15000; clevr_dist structured 6 15000; dmlab structured 6 22735; kitti structured 4 711;
dsprites_loc structured 16 73728; dsprites_ori structured 16 73728; smallnorb_azi structured 18 12150;
smallnorb_ele structured 9 12150
"""
NOAH_FOLDERS = """
caltech101 cifar clevr_count clevr_dist diabetic_retinopathy dmlab dsprites_loc dsprites_ori dtd eurosat kitti
oxford_flowers102 oxford_iiit_pet patch_camelyon resisc45 smallnorb_azi smallnorb_ele sun397 svhn
"""
FGVC_ROWS = {
    "cub_200_2011": (200, 5394, 600, 5794),
    "nabirds": (555, 21536, 2393, 24633),
    "oxford_flowers": (102, 1020, 1020, 6149),
    "stanford_dogs": (120, 10800, 1200, 8580),
    "stanford_cars": (196, 7329, 815, 8041),
}
FEW_SHOT_ROWS = {
    "food101": (101, 30300),
    "oxford_pets": (37, 3669),
    "stanford_cars": (196, 8041),
    "oxford_flowers102": (102, 2463),
    "fgvc_aircraft": (100, 3333),
}
DOMAIN_IMAGES = {
    "train": 16000, "val": 4000, "test": 50000,
    "imagenet-v2": 10000, "imagenet-sketch": 50889, "imagenet-a": 7500, "imagenet-r": 30000,
}  # fmt: skip


# Rows


def test_vtab_has_the_published_tasks_in_three_groups() -> None:
    rows = [line.split() for line in VTAB_ROWS.replace("\n", " ").split(";")]
    assert [[t.name, t.group, str(t.classes), str(t.images["test"])] for t in VTAB.tasks] == rows
    assert all(t.images["train"] == 800 and t.images["val"] == 200 and not t.shots for t in VTAB.tasks)
    assert {t.folder for t in VTAB.tasks} == set(NOAH_FOLDERS.split())
    assert Counter(t.group for t in VTAB.tasks) == {"natural": 7, "specialized": 4, "structured": 8}
    assert VTAB.final_parts == "train+val" and VTAB.squash


def test_fgvc_has_the_published_counts() -> None:
    rows = {t.name: (t.classes, *(t.images[part] for part in ("train", "val", "test"))) for t in FGVC.tasks}
    assert rows == FGVC_ROWS
    assert FGVC.groups == ("fgvc",) and FGVC.final_parts == "train" and not FGVC.squash


def test_few_shot_has_five_sets_with_five_numbers_of_shots() -> None:
    assert [t.name for t in FEW_SHOT.tasks] == [f"{s}-{k}shot" for s in FEW_SHOT_ROWS for k in (1, 2, 4, 8, 16)]
    assert FEW_SHOT.groups == tuple(FEW_SHOT_ROWS) and FEW_SHOT.final_parts == "train"
    for task in FEW_SHOT.tasks:
        classes, test = FEW_SHOT_ROWS[task.group]
        assert task.images == {"train": task.shots * classes, "val": min(task.shots, 4) * classes, "test": test}
        assert task.name == f"{task.group}-{task.shots}shot" and task.classes == classes


def test_domain_generalisation_tests_on_five_sets() -> None:
    (task,) = DOMAINS.tasks
    assert task.images == DOMAIN_IMAGES
    assert (task.name, task.classes, task.shots, DOMAINS.final_parts) == ("imagenet", 1000, 16, "train")


def test_tasks_are_named_as_the_published_results_name_them() -> None:
    for protocol in (VTAB, FGVC):
        groups = {group: tuple(t.name for t in protocol.tasks if t.group == group) for group in protocol.groups}
        published = published_groups(protocol.name)
        assert {group: set(tasks) for group, tasks in groups.items()} == {g: set(t) for g, t in published.items()}


def test_protocols_are_found_by_name_and_can_be_sent_to_another_process() -> None:
    assert {"vtab-1k", "fgvc", "few-shot", "domain-generalisation"} <= PROTOCOLS.keys()
    for name, protocol in PROTOCOLS.items():
        assert get_protocol(name) is protocol
        assert pickle.loads(pickle.dumps(protocol)) == protocol
        assert len({task.name for task in protocol.tasks}) == len(protocol.tasks)
    with pytest.raises(VisgraftError, match="did you mean vtab-1k"):
        get_protocol("vtab1k")


# VTAB-1k

KITTI = task_of(VTAB, "kitti", classes=2)


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    """A root with the lists of one task, each with images of its own, as NOAH's program writes them."""
    labels = {"train800": [0, 1, 1, 0], "val200": [1, 0], "train800val200": [0, 1, 1, 0, 1, 0], "test": [0, 1, 1]}
    for part, of_part in labels.items():
        lines = []
        for number, label in enumerate(of_part):
            write_image(tmp_path / "kitti" / "images" / part / f"{number:06}.jpg")
            lines.append(f"images/{part}/{number:06}.jpg {label}\n")
        (tmp_path / "kitti" / f"{part}.txt").write_text("".join(lines))
    return tmp_path


def test_vtab_lists_are_read_where_each_list_has_images_of_its_own(vtab: Path) -> None:
    parts = opened(VTAB, KITTI, vtab)
    assert parts.classes == ("0", "1")
    expected = [(f"kitti/images/train800/00000{i}.jpg", label) for i, label in enumerate((0, 1, 1, 0))]
    assert names(parts.train, vtab) == expected
    assert len(parts.val) == 2 and {name: len(e) for name, e in parts.tests.items()} == {"test": 3}


def test_a_vtab_union_of_shared_images_must_hold_the_same_images(vtab: Path) -> None:
    folder = vtab / "kitti"
    both = (folder / "train800.txt").read_text() + (folder / "val200.txt").read_text()
    (folder / "train800val200.txt").write_text(both.replace("images/", "./images//"))
    assert len(opened(VTAB, KITTI, vtab).train) == 4
    (folder / "train800val200.txt").write_text(both.replace("val200/000000.jpg", "val200/000009.jpg"))
    text = refused(VTAB, KITTI, vtab)
    assert "train800val200.txt is not train800.txt and val200.txt together" in text and "val200/000009.jpg 1" in text


def test_a_vtab_union_of_copies_must_hold_the_same_labels(vtab: Path) -> None:
    file = vtab / "kitti" / "train800val200.txt"
    file.write_text(file.read_text().replace("5.jpg 0", "5.jpg 1"))
    assert "class 0 has 2 images there and 3 in the two" in refused(VTAB, KITTI, vtab)


def test_a_line_without_a_known_label_is_named(vtab: Path) -> None:
    file = vtab / "kitti" / "test.txt"
    file.write_text("images/test/000000.jpg 0\nimages/test/000001.jpg 2\n")
    assert "test.txt, line 2 has the label 2, but those of kitti are 0 to 1" in refused(VTAB, KITTI, vtab)
    file.write_text("images/test/000000.jpg\n")
    assert "test.txt, line 1 is 'images/test/000000.jpg', but must be" in refused(VTAB, KITTI, vtab)
    for outside in ("../other/000000.jpg", "images/../../other/000000.jpg", "/other/000000.jpg"):
        file.write_text(f"{outside} 0\n")
        assert f"test.txt, line 1 names {outside}, which is not below" in refused(VTAB, KITTI, vtab)


def test_missing_folders_and_files_are_named_with_the_layout(vtab: Path) -> None:
    shutil.copytree(vtab / "kitti", vtab / "cifar100")
    text = refused(VTAB, task_of(VTAB, "cifar100"), vtab)
    assert f"{vtab / 'cifar'} does not exist" in text and "train800val200" in text and "did you mean cifar100" in text
    (vtab / "kitti" / "val200.txt").unlink()
    text = refused(VTAB, KITTI, vtab)
    assert str(vtab / "kitti" / "val200.txt") in text and "ROOT/<task>/" in text
    absent = vtab / "nowhere"
    assert f"{absent} does not exist" in refused(VTAB, KITTI, absent)


# What every protocol refuses


def test_other_numbers_of_images_are_refused_unless_accepted(vtab: Path) -> None:
    text = refused(VTAB, KITTI, vtab, any_size=False)
    assert "vtab-1k, kitti" in text and "4 train images instead of 800" in text and "--any-size" in text
    exact = replace(KITTI, images={"train": 4, "val": 2, "test": 3})
    assert open_task(VTAB, exact, vtab) == opened(VTAB, KITTI, vtab)


@pytest.mark.parametrize(("file", "part"), [("val200.txt", "val"), ("test.txt", "test")])
def test_a_split_that_leaks_is_refused(vtab: Path, file: str, part: str) -> None:
    (vtab / "kitti" / "train800val200.txt").unlink()
    with (vtab / "kitti" / file).open("a") as list_file:
        list_file.write("images/../images/./train800/000001.jpg 1\n")
    text = refused(VTAB, KITTI, vtab)
    assert f"train800/000001.jpg is in train and in {part}, so the split leaks" in text


def test_an_image_twice_in_one_part_is_refused(vtab: Path) -> None:
    with (vtab / "kitti" / "test.txt").open("a") as file:
        file.write("images/test/000001.jpg 0\n")
    assert "test/000001.jpg is twice in test" in refused(VTAB, KITTI, vtab)


def test_an_empty_part_is_refused_whatever_the_size(vtab: Path) -> None:
    (vtab / "kitti" / "test.txt").write_text("\n")
    assert "there are no test images" in refused(VTAB, KITTI, vtab)


def test_published_lists_may_lack_a_class_but_draws_may_not(vtab: Path) -> None:
    assert len(opened(VTAB, replace(KITTI, classes=3), vtab).classes) == 3
    assert "classes without a training image: 2" in refused(VTAB, replace(KITTI, classes=3, shots=1), vtab)


def test_the_digest_follows_labels_and_parts_but_not_the_root(vtab: Path, tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return split_digest(opened(VTAB, KITTI, root), root)

    first = digest(vtab)
    shutil.copytree(vtab / "kitti", tmp_path / "moved" / "kitti")
    assert digest(tmp_path / "moved") == first
    folder = vtab / "kitti"
    (folder / "train800val200.txt").unlink()
    texts = {name: (folder / name).read_text() for name in ("train800.txt", "val200.txt")}
    (folder / "train800.txt").write_text(texts["train800.txt"].replace("0.jpg 0", "0.jpg 1"))
    relabelled = digest(vtab)
    line, _, rest = texts["train800.txt"].partition("\n")
    (folder / "train800.txt").write_text(rest)
    (folder / "val200.txt").write_text(f"{texts['val200.txt']}{line}\n")
    assert len({first, relabelled, digest(vtab)}) == 3


def test_a_check_tells_all_that_is_wrong_with_each_task(vtab: Path) -> None:
    exact = replace(KITTI, images={"train": 4, "val": 2, "test": 3})
    (vtab / "dmlab").mkdir()
    protocol = replace(VTAB, tasks=(exact, task_of(VTAB, "dtd"), task_of(VTAB, "dmlab")))
    good, absent, empty = check_root(protocol, vtab)
    assert (good.task, good.ok, good.text) == ("kitti", True, "2 classes, 4 train, 2 val, 3 test")
    assert not absent.ok and str(vtab / "dtd") in absent.text
    assert not empty.ok and str(vtab / "dmlab" / "train800.txt") in empty.text
    (vtab / "kitti" / "images" / "test" / "000002.jpg").unlink()
    (only,) = check_root(replace(VTAB, tasks=(KITTI,)), vtab)
    assert not only.ok and "4 train images instead of 800" in only.text
    assert "1 image file is missing" in only.text and "test/000002.jpg" in only.text


def test_a_check_looks_for_no_file_where_an_image_is_inside_a_data_set() -> None:
    image = Example(Path("rows 1"), 0, content=bytes)
    parts = Parts(("cat",), (image,), (image._replace(path=Path("rows 2")),), {"test": (Example(Path("rows 3"), 0),)})
    task = replace(KITTI, classes=1, images={}, open=lambda *_: parts)
    (finding,) = check_root(replace(VTAB, tasks=(task,)), Path())
    assert finding.text == "1 image file is missing: rows 3; complete them"


# Any folder


def write_classes(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for number in range(count):
            write_image(root / name / f"{number:02}.png")
    return root


def test_a_folder_becomes_a_protocol_with_shifted_tests(tmp_path: Path) -> None:
    photos, art = write_classes(tmp_path / "photos", cat=20, dog=20), tmp_path / "art"
    write_classes(art, axolotl=2, cat=3, dog=4)
    protocol = pickle.loads(pickle.dumps(folder_protocol(photos, shifted={"art": art})))
    (task,) = protocol.tasks
    parts = open_task(protocol, task, photos)
    assert parts.classes == ("cat", "dog") and task.images == {"train": 26, "val": 6, "test": 8, "art": 7}
    assert [e.label for e in parts.tests["art"]] == [0] * 3 + [1] * 4
    assert "art without axolotl" in protocol.title and protocol.final_parts == "train+val"
    with pytest.raises(DataError, match="shares no class"):
        folder_protocol(photos, shifted={"art": write_classes(tmp_path / "sea", crab=2, eel=2)})
    with pytest.raises(DataError, match="is called 'val'"):
        folder_protocol(photos, shifted={"val": art})


def test_of_a_shifted_set_with_a_test_part_only_that_is_taken(tmp_path: Path) -> None:
    photos = write_classes(tmp_path / "photos", cat=9, dog=9)
    write_classes(tmp_path / "art" / "train", cat=3, dog=3)
    write_classes(tmp_path / "art" / "test", cat=1, dog=2)
    protocol = folder_protocol(photos, shifted={"art": tmp_path / "art"})
    found = open_task(protocol, protocol.tasks[0], photos).tests["art"]
    assert names(found, tmp_path / "art") == [("test/cat/00.png", 0), ("test/dog/00.png", 1), ("test/dog/01.png", 1)]


def test_a_folder_can_be_learned_from_few_shots(tmp_path: Path) -> None:
    photos = write_classes(tmp_path / "photos", cat=20, dog=20)
    protocol = folder_protocol(photos, shots=(1, 8), split=Split(val_fraction=0.1, test_fraction=0.2))
    assert [(t.name, t.group, t.shots) for t in protocol.tasks] == [
        ("photos-1shot", "photos", 1),
        ("photos-8shot", "photos", 8),
    ]
    assert protocol.final_parts == "train" and protocol.tasks[1].images == {"train": 16, "val": 4, "test": 8}
    first, other = (open_task(protocol, protocol.tasks[1], photos, seed) for seed in (0, 1))
    assert first.train != other.train and first.tests == other.tests
    with pytest.raises(DataError, match=r"class 0 \(cat\) has 13 images, fewer than 15 shots"):
        folder_protocol(photos, shots=(15,))


def test_a_folder_whose_test_images_are_its_training_images_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder by another spelling of its path."""
    photos = write_classes(tmp_path / "photos", cat=9, dog=9)
    monkeypatch.chdir(tmp_path)
    protocol = folder_protocol(photos, shifted={"again": Path(os.curdir) / "photos"})
    assert "in train and in again, so the split leaks" in refused(protocol, protocol.tasks[0], photos)
