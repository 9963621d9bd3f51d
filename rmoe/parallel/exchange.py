"""Expert parallelism: each process has some of the experts of a MoE layer.

A row (a token that was routed to an expert) is sent to the process that has
its expert, and the output is sent back (the all-to-all of GShard, 2006.16668).

Axis letters as in rmoe/moe/routing.py. N processes have E' = E / N experts
each, the first process the first E' of them, and so on; M rows arrive at a
process.
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
    """Runs the experts of one layer in the processes that have them.

    It implements :class:`rmoe.moe.experts.Elsewhere`. In a forward pass the
    processes first tell each other how many rows they will send, for which
    the host has to wait once, and then exchange the rows. Both are collective
    calls, so all processes have to call the layer equally often.
    :meth:`gather` lifts this condition for an evaluation, in which one
    process may have more images or windows than another.

    Args:
        mesh: a one-dimensional mesh of the N processes.
        num_experts: E, a multiple of N.
    """

    def __init__(self, mesh: DeviceMesh, num_experts: int) -> None:
        self.group = mesh.get_group()
        self.size = mesh.size()
        self.num_experts = num_experts
        self._gathered: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> 'ExpertParallel':
        # Copies of the layer share the process group, which exists once.
        return self

    @torch.no_grad()
    def gather(self, experts: Experts) -> None:
        """Copy all experts into this process, which computes with them until
        :meth:`release`. All processes must call this."""
        for name, parameter in experts.named_parameters(recurse=False):
            assert isinstance(parameter, DTensor)
            self._gathered[name] = parameter.full_tensor()

    def release(self) -> None:
        """Drop the copies that :meth:`gather` made."""
        self._gathered.clear()

    def local(self, name: str, parameter: Tensor) -> Tensor:
        """This process's part (E', ...) of a parameter (E, ...), or the whole
        parameter between :meth:`gather` and :meth:`release`."""
        if self._gathered:
            return self._gathered[name]
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        if local.requires_grad:
            local.register_hook(self._mean)
        return local

    def _mean(self, grad: Tensor) -> Tensor:
        """Divide a gradient by N, because rows of N processes contribute to
        it. The gradients are averaged afterwards, but only over the processes
        that have copies of the same experts."""
        return grad / self.size

    def apply(self, compute: Callable[[Tensor, Rows | None], Tensor],
              rows_ND: Tensor, rows: Rows | None) -> Tensor:
        """The outputs (M, D) of all rows that an expert serves, each computed
        in the process that has the expert."""
        if self._gathered:
            return compute(rows_ND, rows)
        counts_E = (rows.counts_E if rows is not None else torch.full(
            (self.num_experts, ), len(rows_ND) // self.num_experts,
            dtype=torch.int32, device=rows_ND.device))
        sent_NE, arrived_NE = self._tell_counts(counts_E)
        # The host waits for the device here, and nowhere else.
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
        """Exchange the numbers of rows.

        Returns:
            (N, E') numbers of rows that this process sends to each expert of
            each process, and (N, E') numbers of rows that each process sends
            to each expert of this one.
        """
        sent_NE = counts_E.view(self.size, -1)
        arrived_NE = torch.empty_like(sent_NE)
        dist.all_to_all_single(arrived_NE, sent_NE, group=self.group)
        return sent_NE, arrived_NE

    def _send(self, rows_MD: Tensor, sent: list[int], arrived: list[int]
              ) -> Tensor:
        """Exchange rows, differentiably and without waiting for them: they
        have arrived when the result is first read.

        Args:
            rows_MD: rows in the order of their receivers.
            sent: number of rows for each process.
            arrived: number of rows from each process.

        Returns:
            Rows in the order of their senders.
        """
        return all_to_all_single_autograd(rows_MD.contiguous(), arrived, sent,
                                          self.group)


def _rows_of_owner(arrived_NE: Tensor, counts: list[list[int]]) -> Rows:
    """Describe the rows that arrived, sorted by sender, as rows sorted by
    expert.

    Args:
        arrived_NE: (N, E') numbers of rows from each sender to each expert.
        counts: the same numbers on the host.

    Returns:
        Rows whose ``token_ids_N`` are the places at which they arrived. The
        rows of one expert keep the order of their senders.
    """
    loads = [sum(column) for column in zip(*counts)]
    total = sum(loads)
    arrived_NE = arrived_NE.long()
    # The rows from one sender to one expert are a run. For each run, shift_R is
    # its place among the rows as they arrived, minus its place among the rows
    # sorted by expert.
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
