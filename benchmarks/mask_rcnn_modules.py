"""What attention modules cost in Mask R-CNN: memory and operations at the seven places, and the time of a step.

    python benchmarks/mask_rcnn_modules.py > benchmarks/results/mask-rcnn-modules-<hardware>-<yyyy-mm>.md

Places: one 800 x 1333 image, which detectors pad to 800 x 1344; each module's forward pass alone. Operations are
counted by torch's FLOP counter on tensors without storage (a multiplication and an addition are 2). Memory is counted
as well: the outputs of the three projections, the n x n map of the non-local module, the attended values, their
reprojection and the sum; and it is measured, each in a fresh process (see `lineara.measure`), where the count is below
--most_gigabytes.
Step: forward pass, gradients and update of Mask R-CNN with ResNet-50 on one image with 320 pixels on its short side;
medians over rounds in one process; in every round each network makes one step, in random order. A quiet machine is the
caller's business.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lineara.measure import peak_memory
from lineara.measure.machine import environment
from lineara.models import mask_rcnn
from lineara.nn import EfficientAttention2d, MultiresolutionAttention2d
from lineara.nn.non_local_attention import NonLocalAttention2d

KEY_DIM = 64
# Channels, height and width at the seven places of an 800 x 1344 input.
PLACES = {
    "res3": (512, 100, 168),
    "res4": (1024, 50, 84),
    "fpn1": (256, 200, 336),
    "fpn2": (256, 100, 168),
    "fpn3": (256, 50, 84),
    "fpn4": (256, 25, 42),
    "fpn5": (256, 13, 21),
}
MODULES: dict[str, type[nn.Module]] = {"efficient": EfficientAttention2d, "non-local": NonLocalAttention2d}
# Layer, number of modules, value channels; None is as many as the map has.
NETWORKS: dict[str, tuple[type[nn.Module] | None, int, int | None]] = {
    "plain": (None, 0, None),
    "efficient, 1 module": (EfficientAttention2d, 1, KEY_DIM),
    "efficient, 7 modules": (EfficientAttention2d, 7, KEY_DIM),
    "efficient, 7 modules, wide values": (EfficientAttention2d, 7, None),
    "non-local, 1 module": (NonLocalAttention2d, 1, KEY_DIM),
    "multiresolution, 7 modules": (MultiresolutionAttention2d, 7, KEY_DIM),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most_gigabytes", type=float, default=6.0, help="measure memory where the count is below")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each network")
    options = parser.parse_args()
    print("# Attention modules in Mask R-CNN on the CPU\n")
    print(f"float32, {KEY_DIM} key channels. {environment(Path(__file__).parent)}\n")
    places(options.most_gigabytes)
    steps(options.rounds)


def places(most_gigabytes: float) -> None:
    print("## The seven places on an 800 x 1333 image, forward pass\n")
    print("Values as wide as the map, where not said otherwise.\n")
    print("| place | channels x positions | module | operations, G | memory counted, MB | measured, MB |")
    print("|---|---|---|---|---|---|")
    totals = {name: [0.0, 0.0] for name in MODULES}
    for place, (channels, height, width) in PLACES.items():
        for name in MODULES:
            flops = operations(name, channels, height, width) / 1e9
            counted = bytes_counted(name, channels, height * width) / 1e6
            totals[name][0] += flops
            totals[name][1] += counted
            measured = "not measured"
            if counted < 1e3 * most_gigabytes:
                measured = f"{weigh(name, channels, height, width) / 1e6:.1f}"
            size = f"{channels} x {height * width}"
            print(f"| {place} | {size} | {name} | {flops:.2f} | {counted:,.1f} | {measured} |", flush=True)
    for name, (flops, counted) in totals.items():
        print(f"| all seven | | {name} | {flops:.2f} | {counted:,.1f} | |")
    for name in MODULES:
        flops = sum(operations(name, *sizes, value_dim=KEY_DIM) for sizes in PLACES.values()) / 1e9
        counted = sum(bytes_counted(name, *flat(place), value_dim=KEY_DIM) for place in PLACES) / 1e6
        print(f"| all seven, {KEY_DIM} value channels | | {name} | {flops:.2f} | {counted:,.1f} | |")
    print()
    seven = weigh_seven() / 1e6
    print(f"Seven efficient modules called one after the other, measured in one process: {seven:.1f} MB at the peak;")
    print(f"one non-local module on fpn1 (P2), counted: {bytes_counted('non-local', *flat('fpn1')) / 1e6:,.1f} MB.\n")


def steps(rounds: int) -> None:
    print("## A training step of Mask R-CNN with ResNet-50, one image of 320 x 426\n")
    print(f"{KEY_DIM} value channels; wide values are as wide as the map.\n")
    images, targets = example()
    trained = {name: train_step(name, images, targets) for name in NETWORKS}
    seconds: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for step in trained.values():
        step()
    for _ in range(rounds):
        for name in random.sample(list(trained), len(trained)):
            torch.manual_seed(0)  # the same proposals are drawn
            start = time.perf_counter()
            trained[name]()
            seconds[name].append(time.perf_counter() - start)
    print("| network | median, s | extremes, s | over plain |")
    print("|---|---|---|---|")
    plain = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} | {min(values):.3f}-{max(values):.3f} | {median / plain:.3f} |", flush=True)
    print()


def flat(place: str) -> tuple[int, int]:
    channels, height, width = PLACES[place]
    return channels, height * width


def operations(name: str, channels: int, height: int, width: int, *, value_dim: int | None = None) -> int:
    with torch.device("meta"):
        # The counter sees the products of the readable implementation, not what is inside a compiled one.
        layer = MODULES[name](channels, key_dim=KEY_DIM, value_dim=value_dim, impl="reference")
        x = torch.empty(1, channels, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops()


def bytes_counted(name: str, channels: int, positions: int, *, value_dim: int | None = None) -> int:
    values = channels if value_dim is None else value_dim
    projections = (2 * KEY_DIM + values) * positions
    results = (values + 2 * channels) * positions  # attended, reprojected, added to the input
    between = positions**2 if name == "non-local" else KEY_DIM * values
    return 4 * (projections + between + results)


def weigh(name: str, channels: int, height: int, width: int) -> int:
    import mask_rcnn_modules  # this file as a module, so that a fresh process can find what it is to call

    return peak_memory(partial(mask_rcnn_modules.make_call, name, channels, height, width))


def make_call(name: str, channels: int, height: int, width: int) -> Callable[[], object]:
    layer = MODULES[name](channels, key_dim=KEY_DIM).requires_grad_(False)
    x = torch.randn(1, channels, height, width)
    layer(x[..., :8, :8])
    return partial(layer, x)


def weigh_seven() -> int:
    import mask_rcnn_modules

    return peak_memory(mask_rcnn_modules.make_seven)


def make_seven() -> Callable[[], object]:
    calls = [make_call("efficient", *sizes) for sizes in PLACES.values()]
    return lambda: [call() for call in calls]


def example() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    corners = torch.rand(12, 2) * torch.tensor([300.0, 200.0])
    boxes = torch.cat([corners, corners + 20 + 80 * torch.rand(12, 2)], dim=1).round()
    masks = torch.zeros(12, 320, 426, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    return [torch.rand(3, 320, 426)], [{"boxes": boxes, "labels": torch.arange(1, 13), "masks": masks}]


def train_step(name: str, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Callable[[], None]:
    kind, places, value_dim = NETWORKS[name]
    attention = None if kind is None else lambda dim: kind(dim, key_dim=KEY_DIM, value_dim=value_dim)
    torch.manual_seed(0)
    network = mask_rcnn(attention=attention, places=places, min_size=320, max_size=533)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        sum(network(images, targets).values()).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
