"""Dispatch and combine, compared with a loop over rows."""
import pytest
import torch

from rmoe.moe import dispatch
from rmoe.moe.rows import Rows, order_by_token

T, N, D = 6, 9, 4


def some_rows(kind: str) -> Rows:
    tokens = torch.randint(T, (N, ))
    unserved = by_token = None
    if kind == 'one each':
        tokens = torch.randperm(T)
    if kind == 'some unserved':
        unserved = torch.arange(N) >= 6
    if kind == 'none served':
        unserved = torch.ones(N, dtype=torch.bool)
    if kind != 'one each':
        by_token = order_by_token(tokens, T, unserved)
    nothing = torch.zeros(0)
    return Rows(tokens, nothing, nothing, nothing, nothing, T, N, unserved,
                by_token)


def served(rows: Rows) -> list[tuple[int, int]]:
    """(row, token) of the served rows."""
    return [(row, token) for row, token in enumerate(rows.token_ids_N.tolist())
            if rows.unserved_N is None or not rows.unserved_N[row]]


@pytest.fixture(params=['bags', 'adding'])
def way(request, monkeypatch):
    """Run a test with embedding_bag, and as on devices that lack it."""
    if request.param == 'adding':
        monkeypatch.setattr(dispatch, 'BAGS', ())


@pytest.mark.usefixtures('way')
@pytest.mark.parametrize('mean', [False, True])
@pytest.mark.parametrize('kind', ['one each', 'all served', 'some unserved',
                                  'none served'])
def test_sums_are_a_loops(kind, mean):
    rows = some_rows(kind)
    size = len(rows.token_ids_N)
    x, gates = torch.randn(size, D), torch.rand(size)
    if rows.unserved_N is not None:
        x[rows.unserved_N] = float('nan')  # unserved rows may hold anything
        gates[rows.unserved_N] = 0.
    x.requires_grad_()
    gates.requires_grad_()
    y = dispatch.rows_to_tokens(x, gates, mean, rows)
    wanted = torch.zeros(T, D)
    grad = torch.randn(T, D)
    grad_x, grad_gates = torch.zeros(size, D), torch.zeros(size)
    kept = torch.zeros(T)
    for row, token in served(rows):
        wanted[token] += x[row].detach() * (1. if mean else gates[row])
        grad_x[row] = gates[row].detach() * grad[token]
        grad_gates[row] = x[row].detach() @ grad[token]
        kept[token] += 1
    if mean:
        wanted /= kept.clamp_min(1)[:, None]
    torch.testing.assert_close(y, wanted)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad_x)
    counts = [row for row, _ in served(rows)]
    torch.testing.assert_close(gates.grad[counts], grad_gates[counts])


@pytest.mark.usefixtures('way')
@pytest.mark.parametrize('kind', ['one each', 'all served', 'some unserved'])
def test_tokens_get_the_gradients_of_their_rows(kind):
    rows = some_rows(kind)
    x = torch.randn(T, D, requires_grad=True)
    out = dispatch.tokens_to_rows(x, rows)
    assert torch.equal(out, x[rows.token_ids_N])
    grad = torch.randn_like(out)
    if rows.unserved_N is not None:
        grad[rows.unserved_N] = float('nan')
    out.backward(grad)
    wanted = torch.zeros(T, D)
    for row, token in served(rows):
        wanted[token] += grad[row]
    torch.testing.assert_close(x.grad, wanted)
