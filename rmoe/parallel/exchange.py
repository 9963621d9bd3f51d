"""Expert parallelism: rows travel to the process that has their expert, and
back (the all-to-all of GShard, 2006.16668).

Axis letters as in rmoe/moe/routing.py. N processes have E' = E / N experts
each, in order; M rows arrive at a process.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import (
    all_to_all_single_autograd,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rmoe.moe.blocks import move_rows
from rmoe.moe.experts import Experts
from rmoe.moe.rows import Rows


class ExpertParallel:
    """Puts the experts of one layer into several processes.

    It is an :class:`rmoe.moe.experts.Elsewhere`. In a forward pass processes
    tell each other how many rows they send, which the host has to wait for
    once, and send them. All processes have to call the layer equally often.
    :meth:`gather` lifts that for an evaluation, in which one may have more
    images or windows than another.

    Args:
        mesh: one-dimensional, the N processes.
        num_experts: E, a multiple of N.
    """

    def __init__(self, mesh: DeviceMesh, num_experts: int) -> None:
        self.group = mesh.get_group()
        self.size = mesh.size()
        self.num_experts = num_experts
        self._gathered: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> 'ExpertParallel':
        # A group of processes exists once.
        return self

    @torch.no_grad()
    def gather(self, experts: Experts) -> None:
        """Until :meth:`release`, compute with all experts in this process."""
        for name, parameter in experts.named_parameters(recurse=False):
            assert isinstance(parameter, DTensor)
            self._gathered[name] = parameter.full_tensor()

    def release(self) -> None:
        """Forget what was gathered."""
        self._gathered.clear()

    def local(self, name: str, parameter: Tensor) -> Tensor:
        """(E', ...) of a parameter (E, ...); all of it while gathered."""
        if self._gathered:
            return self._gathered[name]
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        if local.requires_grad:
            local.register_hook(self._mean)
        return local

    def _mean(self, grad: Tensor) -> Tensor:
        """Rows of N processes came to these experts. What averages gradients
        afterwards knows only of the processes with the same experts."""
        return grad / self.size

    def apply(self, compute: Callable[[Tensor, Rows | None], Tensor],
              rows_ND: Tensor, rows: Rows | None) -> Tensor:
        """(M, D), the rows that somebody serves, through their experts."""
        if self._gathered:
            return compute(rows_ND, rows)
        counts_E = (rows.counts_E if rows is not None else torch.full(
            (self.num_experts, ), len(rows_ND) // self.num_experts,
            dtype=torch.int32, device=rows_ND.device))
        sent_NE, arrived_NE = self._tell_counts(counts_E)
        # The one time that the host waits.
        counts = torch.stack([sent_NE, arrived_NE]).tolist()
        sent, arrived = ([sum(row) for row in one] for one in counts)
        arriving = self._send(rows_ND[:sum(sent)], sent, arrived)
        own = _rows_of_owner(arrived_NE, counts[1])
        from_M = own.token_ids_N
        back_M = torch.empty_like(from_M).scatter_(
            0, from_M, torch.arange(len(from_M), device=from_M.device))
        out_MD = compute(move_rows(arriving, from_M, back_M), own)
        return self._send(move_rows(out_MD, back_M, from_M), arrived, sent)

    def _tell_counts(self, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """(N, E') rows that go to each expert of each process, and (N, E')
        that come from each process to each expert of this one."""
        sent_NE = counts_E.view(self.size, -1)
        arrived_NE = torch.empty_like(sent_NE)
        dist.all_to_all_single(arrived_NE, sent_NE, group=self.group)
        return sent_NE, arrived_NE

    def _send(self, rows_MD: Tensor, sent: list[int], arrived: list[int]
              ) -> Tensor:
        """Rows in the order of their receivers to rows in the order of their
        senders; they may be on their way until somebody reads them."""
        return all_to_all_single_autograd(rows_MD.contiguous(), arrived, sent,
                                          self.group)


def _rows_of_owner(arrived_NE: Tensor, counts: list[list[int]]) -> Rows:
    """What arrived, sorted by sender, as rows sorted by expert.

    Args:
        arrived_NE: (N, E') rows from each sender to each expert.
        counts: the same as numbers.

    Returns:
        Rows whose ``token_ids_N`` are the places at which they arrived. Those
        of one expert keep the order of their senders.
    """
    loads = [sum(column) for column in zip(*counts)]
    total = sum(loads)
    arrived_NE = arrived_NE.long()
    # Runs of rows from one sender to one expert: where each began, and begins.
    ends_NE = arrived_NE.flatten().cumsum(0).view_as(arrived_NE)
    length_R = arrived_NE.T.flatten()
    shift_R = (ends_NE - arrived_NE).T.flatten() - (
        length_R.cumsum(0) - length_R)
    place_M = torch.arange(total, device=arrived_NE.device)
    counts_E = arrived_NE.sum(0)
    return Rows(
        token_ids_N=place_M + shift_R.repeat_interleave(
            length_R, output_size=total),
        expert_ids_N=torch.arange(
            len(loads), device=place_M.device).repeat_interleave(
                counts_E, output_size=total),
        counts_E=counts_E.int(), ends_E=counts_E.cumsum(0).int(),
        demand_E=counts_E.int(), num_tokens=total, max_rows=max(loads))
