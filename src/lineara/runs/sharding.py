"""Weights sharded over the processes of a run: each holds its part, and gathers a block's when the block is run.

Every task is a `ShardedTask`, so this is the one place that knows how a network is sharded. The mesh has two
dimensions, named as Lightning names them: "data_parallel", over which batches are shared, and "tensor_parallel", whose
processes are given the same batch, and may share its positions. Weights are sharded over both, and gradients are the
mean over both, so that they are those of one process: each of the second dimension has the loss of the whole batch.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


class ShardedStrategy(ModelParallelStrategy):
    """What `--trainer.strategy fsdp` is: FSDP2, on CPUs and GPUs, with checkpoints that one process can read.

    Args:
        same_batch_size: how many processes are given the same batch each, the mesh's second dimension.
            A task with `sequence_parallel` sets it.
        process_group_backend: of torch.distributed; None takes gloo on CPUs and nccl on GPUs.
        weights: "sharded" ("spread" in recipes of before), or "replicated": every process holds them all, as under DDP.
    """

    def __init__(
        self,
        same_batch_size: int = 1,
        process_group_backend: str | None = None,
        weights: Literal["sharded", "replicated", "spread"] = "sharded",
    ) -> None:
        super().__init__(
            tensor_parallel_size=same_batch_size,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.same_batch_size = same_batch_size
        self.weights = "sharded" if weights == "spread" else weights

    def setup_environment(self) -> None:
        processes = self.num_nodes * self.num_processes
        name, setting, size = "same_batch_size", "--trainer.strategy.init_args.same_batch_size", self.same_batch_size
        asked = getattr(self.lightning_module, "sequence_parallel", 1)
        if asked > 1:
            if size not in (1, asked):
                raise ValueError(
                    f"same_batch_size must be sequence_parallel where positions are shared, got {size} and {asked}; "
                    f"leave {setting} out"
                )
            name, setting, size = "sequence_parallel", "--model.sequence_parallel", asked
        if size < 1 or processes % size:
            raise ValueError(
                f"{name} must divide the number of processes, got {size} and {processes}; set --trainer.devices or "
                f"{setting}"
            )
        self._data_parallel_size, self._tensor_parallel_size = processes // size, size
        super().setup_environment()

    # Processes may be given different numbers of batches to evaluate: they must not wait for each other in a layer.

    def on_validation_start(self) -> None:
        self._set_unsharded(True)

    def on_validation_end(self) -> None:
        self._set_unsharded(False)

    def on_test_start(self) -> None:
        self._set_unsharded(True)

    def on_test_end(self) -> None:
        self._set_unsharded(False)

    def _set_unsharded(self, whole: bool) -> None:
        assert self.model is not None
        if whole:  # as DDP does: what a batch normalisation has seen is the first process's
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        set_unsharded(self.model, whole)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        return super().load_checkpoint(checkpoint_path, weights_only=True)


class ShardedTask(LightningModule):
    """A task whose `network` may be sharded over processes; with any other strategy it is as it was.

    Where a task sets `sequence_parallel`, so many processes share the positions of a batch, and its network has
    `shard_positions(group)`, after which each is called with the same whole batch and returns the same.
    """

    network: nn.Module
    sequence_parallel: int = 1

    def configure_model(self) -> None:
        """Shard the network, once the processes know of each other."""
        mesh = self.device_mesh
        if mesh is None and self.sequence_parallel > 1:
            raise ValueError(
                f"sequence_parallel must be 1 unless the strategy is fsdp, got {self.sequence_parallel}; set "
                "--trainer.strategy fsdp, and --trainer.devices to a multiple of it"
            )
        if mesh is None or isinstance(self.network, FSDPModule):
            return
        if self.sequence_parallel > 1:
            self._share_positions(mesh["tensor_parallel"])
        if getattr(self.trainer.strategy, "_layer_sync", None) is not None:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        shard_network(self.network, mesh, getattr(self.trainer.strategy, "weights", "sharded"))

    def _share_positions(self, group: DeviceMesh) -> None:
        self.network.shard_positions(group)  # type: ignore[operator]
        # Processes begin with the same random numbers: what one drops of its positions says nothing of another's.
        torch.manual_seed(torch.initial_seed() + group.get_local_rank())


def shard_network(network: nn.Module, mesh: DeviceMesh, how: str = "sharded") -> None:
    """Shard every block of a network over all processes of the run, and what is in no block with the whole.

    A block is a member of a list or sequence of layers that has layers itself: an encoder block, a residual block.

    Args:
        network: changed in place.
        mesh: of all processes.
        how: "replicated" leaves all weights with every process; gradients are the mean over processes either way.
    """
    shape = (mesh.size(),) if how == "sharded" else (mesh.size(), 1)  # copies, and over how many each is sharded
    names = ("weights",) if how == "sharded" else ("copies", "weights")
    weights = init_device_mesh(mesh.device_type, shape, mesh_dim_names=names)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which no task writes into
    for block in _blocks(network):
        fully_shard(block, mesh=weights)
    fully_shard(network, mesh=weights)


def set_unsharded(network: nn.Module, whole: bool) -> None:
    """Let every process hold all weights, until it is called again: nothing is gathered meanwhile."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(not whole, recurse=False)
            if whole:
                module.unshard()
            else:
                module.reshard()


def layers_wait(network: nn.Module) -> bool:
    """Whether layers of a network wait for those of other processes: then all must run it equally often."""
    return any(isinstance(module, FSDPModule | nn.SyncBatchNorm) for module in network.modules())


def shares(trainer: Trainer | None) -> tuple[int, int]:
    """Among how many the batches are shared, and which share is this process's."""
    if trainer is None:
        return 1, 0
    kwargs: Mapping[str, Any] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return kwargs.get("num_replicas", trainer.world_size), kwargs.get("rank", trainer.global_rank)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Inner ones first, as they must be sharded."""
    containers = (nn.ModuleList, nn.ModuleDict)
    members = [
        member
        for container in network.modules()
        if isinstance(container, (nn.Sequential, *containers))
        for member in container.children()
        if not isinstance(member, containers) and any(True for _ in member.children())
    ]
    found = {id(member) for member in members if any(weight.numel() for weight in member.parameters())}
    yield from (module for module in reversed(list(network.modules())) if id(module) in found)
