"""Annotation files: read whole, refused in one sentence, or cleared of what is broken."""

import gc
import json
import warnings

import pytest

from lineara.tasks.instance_segmentation.coco_files import read_annotations


def read(root, **options):
    return read_annotations(root / "annotations" / "instances_val2017.json", image_folder=root / "val2017", **options)


def ids(content):
    return {key: [entry["id"] for entry in content[key]] for key in ("images", "annotations", "categories")}


WHOLE = {"images": [7, 3, 11, 5, 2], "annotations": [4, 9, 6, 8, 12], "categories": [3, 1]}


def test_a_good_file_is_read_as_it_is(tiny_set, annotations):
    content = read(tiny_set)
    assert ids(content) == WHOLE
    assert content == {key: annotations[key] for key in ("images", "annotations", "categories")} | {"num_left_out": 0}


def test_missing_areas_and_crowd_marks_are_filled_in(tiny_set, annotations, write):
    for annotation in annotations["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    write(tiny_set, annotations)
    by_id = {annotation["id"]: annotation for annotation in read(tiny_set)["annotations"]}
    assert {number: annotation["area"] for number, annotation in by_id.items()} == {
        **{4: 20 * 13, 6: 15, 8: 37 * 37, 12: 61 * 19},
        9: pytest.approx(100, abs=15),  # half of 10 x 20, by the pixels
    }
    assert all(annotation["iscrowd"] == 0 for annotation in by_id.values())


def test_images_may_lie_in_folders_of_the_folder(tiny_set, annotations, write):
    (tiny_set / "val2017" / "more").mkdir()
    (tiny_set / "val2017" / "a.jpg").rename(tiny_set / "val2017" / "more" / "a.jpg")
    annotations["images"][0]["file_name"] = "more/a.jpg"
    write(tiny_set, annotations)
    assert ids(read(tiny_set)) == WHOLE


def test_images_are_looked_for_only_where_a_folder_is_given(tiny_set):
    for image in (tiny_set / "val2017").iterdir():
        image.unlink()
    assert ids(read_annotations(tiny_set / "annotations" / "instances_val2017.json")) == WHOLE


def test_the_garbage_collector_is_left_as_it_was(tiny_set, write):
    read(tiny_set)
    assert gc.isenabled()
    write(tiny_set, "{")
    with pytest.raises(ValueError, match="whole JSON"):
        read(tiny_set)
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="whole JSON"):
            read(tiny_set)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"images": [', r"must be whole JSON, got a damaged file \(Expecting value: .*\); get it again$"),
        ("", r"must be whole JSON, got a damaged file \(.*\); get it again$"),
        ("[" * 100_000, r"must be whole JSON, got a damaged file \(.*\); get it again$"),
        ("[1]", "must hold the lists images, annotations and categories, got no list images; name"),
        ({"images": [], "annotations": {}}, "must hold the lists .*, got no list annotations; name"),
        ({"images": [], "annotations": [], "categories": None}, "must hold the lists .*, got no list categories; name"),
    ],
)
@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_damaged_file_is_refused(tiny_set, write, content, reason, skip_broken):
    path = write(tiny_set, content)
    with pytest.raises(ValueError, match=reason) as caught:
        read(tiny_set, skip_broken=skip_broken)
    assert str(caught.value).startswith(f"{path} must")


def test_bytes_that_are_no_text_are_refused(tiny_set):
    (tiny_set / "annotations" / "instances_val2017.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="must be whole JSON, got a damaged file"):
        read(tiny_set)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^.*x\.json must be an annotation file .*, got no such file; put"):
        read_annotations(tmp_path / "x.json")


def break_image(content):
    content["images"][1]["height"] = "53"  # of image 3, with annotation 6


def break_annotation(content):
    content["annotations"][3]["bbox"] = [0, 0, 37, 0]


def repeat_image(content):
    content["images"].append({**content["images"][0], "file_name": "b.png"})


def count_below_nothing(content):
    content["images"][1]["id"] = -3  # image 3 of annotation 6
    content["annotations"][2]["image_id"] = -3


def go_beyond_64_bits(content):
    content["annotations"][3]["id"] = 2**63


def leave_image(content):
    content["annotations"][3] |= {"bbox": [37, 0, 5, 5], "segmentation": [[37, 0, 42, 0, 42, 5]]}


def forget_id(content):
    del content["annotations"][2]["id"]


FAULTS = [
    (break_image, "image 3: height must be", {"images": [7, 11, 5, 2], "annotations": [4, 9, 8, 12]}),
    (break_annotation, "annotation 8: bbox must be 4 finite", {"annotations": [4, 9, 6, 12]}),
    (
        count_below_nothing,
        r"image -3: its id must be a whole number from 0 to 2\*\*63 - 1, got -3",
        {"images": [7, 11, 5, 2], "annotations": [4, 9, 8, 12]},
    ),
    (go_beyond_64_bits, f"annotation {2**63}: its id must be a whole number from 0", {"annotations": [4, 9, 6, 12]}),
    (leave_image, "annotation 8: bbox must overlap its image", {"annotations": [4, 9, 6, 12]}),
    # With both images, what is annotated in either.
    (
        repeat_image,
        "image 7: its id must be its own, got one that another image has",
        {"images": [3, 11, 5, 2], "annotations": [6, 8, 12]},
    ),
    (forget_id, "annotation at position 2 of its list: it must have id, .*, got no id", {"annotations": [4, 9, 8, 12]}),
]


@pytest.mark.parametrize(("fault", "reason", "left"), FAULTS, ids=lambda part: getattr(part, "__name__", ""))
class TestBrokenEntry:
    def test_is_refused(self, tiny_set, annotations, write, fault, reason, left):
        fault(annotations)
        path = write(tiny_set, annotations)
        with pytest.raises(ValueError, match=f"^{path}, {reason}.*; mend the file or set skip_broken$"):
            read(tiny_set)

    def test_is_left_out_and_reported_if_asked_for(self, tiny_set, annotations, write, fault, reason, left):
        fault(annotations)
        path = write(tiny_set, annotations)
        with pytest.warns(RuntimeWarning, match=f"^left out: {path}, {reason}") as reported:
            content = read(tiny_set, skip_broken=True)
        assert len(reported) == (2 if fault is repeat_image else 1)
        assert ids(content) == WHOLE | left


def test_a_missing_image_is_refused_or_left_out_with_its_annotations(tiny_set):
    (tiny_set / "val2017" / "a.jpg").unlink()
    reason = r"instances_val2017\.json, image 7: .*val2017/a\.jpg must be an image file, got no such file"
    with pytest.raises(FileNotFoundError, match=f"{reason}; put it there or set skip_broken$"):
        read(tiny_set)
    with pytest.warns(RuntimeWarning, match=reason):
        assert ids(read(tiny_set, skip_broken=True)) == WHOLE | {"images": [3, 11, 5, 2], "annotations": [6, 8, 12]}


def test_a_missing_folder_is_a_missing_image(tiny_set):
    with pytest.raises(FileNotFoundError, match=r"image 7: .*elsewhere/a\.jpg must be an image file"):
        read_annotations(tiny_set / "annotations" / "instances_val2017.json", image_folder=tiny_set / "elsewhere")


@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_set_without_a_category_is_refused(tiny_set, annotations, write, skip_broken):
    path = write(tiny_set, annotations | {"annotations": [], "categories": []})
    with pytest.raises(ValueError, match=f"^{path} must list at least one category, got none; add those of its obj"):
        read(tiny_set, skip_broken=skip_broken)


@pytest.mark.parametrize(("number", "last"), [(10, None), (11, 1), (23, 13)])
def test_ten_broken_entries_are_named_and_the_others_counted(tiny_set, annotations, write, number, last):
    template = annotations["annotations"][0]
    annotations["annotations"] += [{**template, "id": 100 + i, "category_id": 50} for i in range(number)]
    path = write(tiny_set, annotations)
    with pytest.warns(RuntimeWarning) as reported:
        assert ids(read(tiny_set, skip_broken=True)) == WHOLE
    messages = [str(warning.message) for warning in reported]
    assert [f"annotation {100 + i}:" in message for i, message in enumerate(messages[:10])] == [True] * 10
    assert messages[10:] == ([] if last is None else [f"left out: {last} more broken entries of {path}"])


def test_the_flat_objects_of_cocos_own_training_set_are_left_out_without_asking(tiny_set, annotations, write):
    annotations["images"][0]["id"] = 200365
    for annotation in annotations["annotations"][:2]:
        annotation["image_id"] = 200365
    annotations["annotations"][0]["bbox"] = [296.65, 388.33, 1.03, 0.0]
    write(tiny_set, annotations)
    with pytest.warns(RuntimeWarning, match="^left out: .*, annotation 4: a flat object of COCO's own training set"):
        content = read(tiny_set)
    assert [annotation["id"] for annotation in content["annotations"]] == [9, 6, 8, 12]
    annotations["annotations"][0]["bbox"] = [296.65, 388.33, 0.0, 1.03]  # another fault in the same image
    write(tiny_set, annotations)
    with pytest.raises(ValueError, match="annotation 4: bbox must be"):
        read(tiny_set)


def test_a_file_with_a_mark_of_its_byte_order_is_read(tiny_set, annotations):
    path = tiny_set / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(annotations), encoding="utf-8-sig")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(read(tiny_set)) == WHOLE
