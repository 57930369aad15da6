"""The data module: its loaders, how a run goes on, what it tells of a set, and what it refuses."""

import importlib.util
import shutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from lineara.tasks import instance_segmentation
from lineara.tasks.instance_segmentation import CocoData

SILENT = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def coco(root, **options):
    return CocoData(str(root), **{"num_workers": 0, "batch_size": 2} | options)


def set_up(root, stage="fit", **options):
    data = coco(root, **options)
    data.prepare_data()
    data.setup(stage)
    return data


def ids(batches):
    return [[target["image_id"] for target in batch["targets"]] for batch in batches]


# Loaders.


def test_training_sees_every_image_in_batches_of_one_shape(tiny_set):
    loader = set_up(tiny_set).train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 3  # two of the three wide ones, the third, and the two tall ones
    assert sorted(chain(*ids(batches))) == [2, 3, 5, 7, 11]
    assert [2, 3] in map(sorted, ids(batches))
    for batch in batches:
        for image, target in zip(batch["images"], batch["targets"]):
            assert image.shape[1:] == target["masks"].shape[1:]


def test_validation_and_test_see_the_images_in_their_order(tiny_set):
    data = set_up(tiny_set)
    assert ids(data.val_dataloader()) == [[7, 3], [11, 5], [2]]
    data.setup("test")
    assert ids(data.test_dataloader()) == [[7, 3], [11, 5], [2]]


def test_test_takes_its_own_files_where_there_are_any(tiny_set, annotations, write):
    annotations["images"] = annotations["images"][:2]
    annotations["annotations"] = annotations["annotations"][:3]
    write(tiny_set, annotations, "other")
    files = {"test_images": "val2017", "test_annotations": "annotations/instances_other2017.json"}
    data = set_up(tiny_set, "test", **files)
    assert ids(data.test_dataloader()) == [[7, 3]]
    assert len(data.annotations("test")["images"]) == 2
    assert len(data.annotations("val")["images"]) == 5


def test_annotations_are_cocos_and_read_once(tiny_set, annotations):
    data = set_up(tiny_set)
    (tiny_set / "annotations" / "instances_val2017.json").unlink()
    data.setup("test")
    for split in ("val", "test"):
        read = {key: annotations[key] for key in ("images", "annotations", "categories")}
        assert data.annotations(split) == read | {"labels": {3: 3, 1: 1}, "num_left_out": 0}
    assert data.categories == {3: "boat", 1: "bird"}


def test_categories_are_known_before_anything_is_set_up_or_unknown(tiny_set, tmp_path):
    assert coco(tiny_set).categories == {3: "boat", 1: "bird"}
    assert coco(tmp_path / "nowhere").categories == {}


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_loading_draws_no_random_number_of_the_training(tiny_set, stage):
    data = set_up(tiny_set, stage)
    before = torch.get_rng_state()
    for loader in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
        assert list(getattr(data, f"{loader}_dataloader")())
    assert torch.equal(torch.get_rng_state(), before)


def epoch(data, number):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def same(one, other):
    return ids(one) == ids(other) and all(
        torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x["images"], y["images"])
    )


def test_the_order_and_the_flips_are_those_of_seed_and_epoch(tiny_set):
    data = set_up(tiny_set, batch_size=1)
    first = epoch(data, 2)
    assert same(first, epoch(set_up(tiny_set, batch_size=1), 2))
    assert same(first, epoch(set_up(tiny_set, batch_size=1, num_workers=2), 2))
    assert not same(first, epoch(data, 1))
    assert not same(first, epoch(set_up(tiny_set, batch_size=1, shuffle_seed=1), 2))
    seen = [
        dict(zip(chain(*ids(batches)), chain(*(batch["images"] for batch in batches))))
        for batches in (epoch(data, number) for number in range(12))
    ]
    sights = {images[7].numpy().tobytes() for images in seen}
    assert sights == {seen[0][7].numpy().tobytes(), seen[0][7].flip(-1).numpy().tobytes()}


@pytest.mark.parametrize(("probability", "flipped"), [(0.0, False), (1.0, True)])
def test_flips_are_as_probable_as_asked_for(tiny_set, probability, flipped):
    shutil.rmtree(tiny_set / "val2017")
    shutil.copytree(tiny_set / "train2017", tiny_set / "val2017")
    data = set_up(tiny_set, horizontal_flip=probability)
    plain = {target["image_id"]: image for image, target in pairs(data.val_dataloader())}
    for image, target in pairs(data.train_dataloader()):
        assert torch.equal(image, plain[target["image_id"]].flip(-1) if flipped else plain[target["image_id"]])


def pairs(loader):
    return [pair for batch in loader for pair in zip(batch["images"], batch["targets"])]


def test_processes_share_the_images(tiny_set):
    shares, scored = [], []
    for rank in range(2):
        data = set_up(tiny_set, batch_size=1)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        shares.append(ids(data.train_dataloader()))
        scored.append(ids(data.val_dataloader()))
    assert [len(share) for share in shares] == [3, 3]
    assert {number for share in shares for (number,) in share} == {2, 3, 5, 7, 11}
    assert scored == [[[7], [11], [2]], [[3], [5]]]


# Runs that go on.


class Recorder(LightningModule):
    """Learns nothing, and keeps the ids of the images of every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen += ids([batch])
        return self.weight * 0

    def validation_step(self, batch, batch_index):
        assert ids([batch]) == [[self.trainer.datamodule.annotations("val")["images"][batch_index]["id"]]]

    def predict_step(self, batch, batch_index):
        return [target["file_name"] for target in batch["targets"]]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(root, folder, steps, resume=None):
    task, keep = Recorder(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    data = coco(root, batch_size=1)
    trainer = Trainer(max_steps=steps, callbacks=[keep], **SILENT)
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    return task.seen, data


def test_a_resumed_run_goes_on_with_the_next_batch(tiny_set, tmp_path):
    whole, _ = train(tiny_set, tmp_path / "whole", 13)  # 2 epochs of 5 batches, and 3 batches
    assert len(whole) == 13
    assert whole[:5] != whole[5:10]
    begun, _ = train(tiny_set, tmp_path / "begun", 7)
    resumed, data = train(tiny_set, tmp_path / "begun", 13, resume=tmp_path / "begun" / "step=7.ckpt")
    assert begun + resumed == whole
    assert data.categories == {3: "boat", 1: "bird"}


def test_a_checkpoint_tells_the_categories_where_the_set_is_not(tiny_set, tmp_path):
    train(tiny_set, tmp_path / "begun", 3)
    state = torch.load(tmp_path / "begun" / "step=3.ckpt", weights_only=True)["CocoData"]
    assert state == {"batches_done": 3, "categories": {3: "boat", 1: "bird"}}
    data = coco(tmp_path / "nowhere")
    data.load_state_dict(state)
    assert data.categories == {3: "boat", 1: "bird"}


# Detectors, and images to predict on.


@pytest.fixture
def detector():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    yield MaskRCNN(backbone, num_classes=91, min_size=48, max_size=64, rpn_post_nms_top_n_train=20)
    torch.set_num_threads(threads)


def test_detectors_learn_from_images_without_an_object_too(tiny_set, detector):
    torch.manual_seed(0)
    for batch in set_up(tiny_set, horizontal_flip=1.0).train_dataloader():
        losses = detector(batch["images"], batch["targets"])
        assert len(losses) == 5
        assert all(torch.isfinite(loss) for loss in losses.values())
    empty = set_up(tiny_set).images("val")[[(3, 0)]]
    assert len(empty["targets"][0]["boxes"]) == 0
    sum(detector(empty["images"], empty["targets"]).values()).backward()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, (height, width) in (("c.jpg", (31, 47)), ("a.png", (53, 29)), ("d.JPEG", (37, 37))):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2])
def test_prediction_takes_the_images_of_a_folder_and_tells_of_broken_ones(tmp_path, folder, batch_size):
    data = coco(tmp_path / "nowhere", predict_folder=str(folder), batch_size=batch_size)
    with pytest.warns(RuntimeWarning, match=r"^left out: .*b\.jpg must be an image that can be read"):
        names = Trainer(**SILENT).predict(Recorder(), data)
    assert names == [["a.png"], ["c.jpg", "d.JPEG"]] if batch_size == 2 else [["a.png"], [], ["c.jpg"], ["d.JPEG"]]


def test_prediction_needs_a_folder_with_images(tiny_set, tmp_path):
    with pytest.raises(ValueError, match=r"^predict_folder must be a folder of images, got none; set --data\.predict"):
        coco(tiny_set).setup("predict")
    with pytest.raises(FileNotFoundError, match=r"must hold images \(.jpg, .*\), got none; name another one"):
        coco(tiny_set, predict_folder=str(tiny_set)).setup("predict")


# What is told of a set, and what is refused.


def test_the_summary_counts_images_instances_and_crowds(tiny_set):
    assert list(coco(tiny_set).summary()) == [
        str(tiny_set),
        "train: 5 images, 4 instances, 1 crowds, 2 images without instances",
        "val: 5 images, 4 instances, 1 crowds, 2 images without instances",
        "categories: 2: 1 bird, 3 boat",
    ]
    own_test = {"test_images": "val2017", "test_annotations": "annotations/instances_train2017.json"}
    assert [line.split(":")[0] for line in list(coco(tiny_set, **own_test).summary())[1:]] == [
        *("train", "val", "test", "categories")
    ]


@pytest.mark.parametrize(
    ("missing", "kind"),
    [("", "images"), ("train2017", "images"), ("annotations/instances_train2017.json", "annotations")],
)
def test_a_missing_part_of_the_set_is_named_with_its_layout(tiny_set, missing, kind):
    path = tiny_set / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = path if missing else tiny_set / "train2017"
    with pytest.raises(
        FileNotFoundError,
        match=f"^{first} must be the {kind} for train, got nothing there; unpack the set so that {tiny_set} holds "
        "train2017 and annotations/instances_train2017.json, or set data_root, train_images and train_annotations$",
    ):
        coco(tiny_set).setup("fit")


def test_a_set_without_images_is_refused(tiny_set, annotations, write):
    path = write(tiny_set, annotations | {"images": [], "annotations": []})
    with pytest.raises(ValueError, match=f"^{path} must hold at least 1 image, got none; name another file$"):
        coco(tiny_set).setup("validate")


def test_splits_must_agree_on_the_names_of_categories(tiny_set, annotations, write):
    annotations["categories"][0]["name"] = "ship"
    path = write(tiny_set, annotations)
    with pytest.raises(ValueError, match=f"^{path}, category 3: its name must be .*boat.*, got 'ship'; name files"):
        coco(tiny_set).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_ends_a_run_in_one_sentence(tiny_set, num_workers):
    path = tiny_set / "val2017" / "c.jpg"
    path.write_bytes(b"no image")
    data = set_up(tiny_set, "validate", num_workers=num_workers)
    with pytest.raises(
        ValueError, match=rf"^image 11: {path} must be an image that can be read, .*; replace .* skip_broken$"
    ):
        list(data.val_dataloader())


def test_broken_things_are_left_out_if_asked_for(tiny_set, annotations, write):
    for split in ("train", "val"):
        (tiny_set / f"{split}2017" / "c.jpg").write_bytes(b"no image")
        (tiny_set / f"{split}2017" / "a.jpg").unlink()
    annotations["annotations"][2]["bbox"] = [0, 0, 0, 0]
    write(tiny_set, annotations, "train")
    with pytest.warns(RuntimeWarning, match="left out"):
        data = set_up(tiny_set, skip_broken=True)
    with pytest.warns(RuntimeWarning, match="image 11"):
        assert ids(data.val_dataloader()) == [[3], [5, 2]]
    with pytest.warns(RuntimeWarning, match="image 11"):
        seen = list(chain(*ids(data.train_dataloader())))
    assert len(seen) == 4
    assert set(seen) == {2, 3, 5}  # one of them in the place of 11


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"horizontal_flip": 1.5}, "horizontal_flip must be a probability from 0 to 1, got 1.5"),
        (
            {"test_images": "x"},
            "test_images and test_annotations must be given together, got 'x' and None; set both or",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(options, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        CocoData(**options)


@pytest.mark.parametrize(
    ("absent", "name"), [("torchvision", "torchvision"), ("faster_coco_eval", "faster-coco-eval"), ("PIL", "pillow")]
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, absent, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None if library == absent else find_spec(library))
    with pytest.raises(ImportError, match=rf"needs {name}, which is not .*: pip install 'lineara\[train,vision\]'$"):
        importlib.reload(instance_segmentation)


def test_nothing_is_printed(tiny_set, capfd):
    data = set_up(tiny_set)
    list(data.train_dataloader())
    list(data.summary())
    assert capfd.readouterr() == ("", "")
