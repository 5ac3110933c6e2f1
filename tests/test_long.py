"""Long sequences: the same answer in blocks of rows as at once, and no matrix of all pairs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import laconic
from families import images, make
from laconic.core import gather as rows
from laconic.methods.ops import cosine, density_peaks, greedy_pairs, lloyd, nearest, one_to_one
from laconic.methods.ops.clustering import Distances
from laconic.methods.pitome import energies


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        self.most = max([self.most, *(t.untyped_storage().nbytes() // t.element_size() for t in made if torch.is_tensor(t))])
        return out


def halves(x):
    return nearest(x[:, ::2], x[:, 1::2])


WORK = {
    "nearest": halves,
    "energy": lambda x: (energies(x, 0.5),),
    "pairs": lambda x: greedy_pairs(x, 9),
    "peaks": lambda x: density_peaks(x, 20),
    "peaks of the sample": lambda x: density_peaks(x.double(), 20, "paper", "nearest", "sample"),
    "lloyd": lambda x: lloyd(x, torch.ones_like(x[..., 0]), torch.arange(20).expand(len(x), -1), 3),
}
every_part = pytest.mark.parametrize("work", WORK.values(), ids=WORK)


@pytest.fixture
def in_blocks(monkeypatch):
    def switch(whole=0, size=7):
        monkeypatch.setattr(rows, "WHOLE", whole)
        monkeypatch.setattr(rows, "ROWS", size)

    return switch


@every_part
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_give_the_same(work, dtype, in_blocks):
    x = torch.randn(2, 61, 8).to(dtype)
    at_once = work(x)
    in_blocks()
    assert len(rows.in_parts(x, 61)) == 9
    for a, b, alone in zip(at_once, work(x), work(x[1:]), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert torch.allclose(a[1:], alone, atol=1e-6)


def test_the_first_of_equals_wins_in_blocks(in_blocks):
    x = torch.ones(1, 40, 4)
    in_blocks()
    assert halves(x)[1].eq(0).all()


def test_gradients_of_blocks(in_blocks):
    x = torch.randn(2, 31, 8, requires_grad=True)
    plain = torch.autograd.grad(halves(x)[0].sum(), x)[0]
    in_blocks()
    assert torch.allclose(plain, torch.autograd.grad(halves(x)[0].sum(), x)[0], atol=1e-6)


@pytest.mark.parametrize("x", [torch.randn(1, 30, 5), torch.randint(0, 2, (1, 30, 3)).float()], ids=["different", "ties"])
def test_greedy_pairs_are_exact(x):
    brute_force(x, *greedy_pairs(x, 12))


def test_greedy_pairs_are_exact_over_several_lists(monkeypatch, in_blocks):
    import sys

    monkeypatch.setattr(sys.modules["laconic.methods.ops.nearest"], "WINDOW", 3)
    in_blocks()
    x = torch.randn(1, 30, 5)
    brute_force(x, *greedy_pairs(x, 12))


def test_lists_are_as_long_as_it_takes(in_blocks):
    """All but the last of the partners that the first row is most similar to go to others that are nearer to them."""
    pairs = torch.eye(14)[:8].repeat_interleave(2, 0) + 0.01 * torch.randn(16, 14)
    hub, far = torch.ones(1, 14), torch.cat([torch.full((1, 8), 0.5), torch.full((1, 6), 1.5)], 1)
    x = torch.cat([hub, pairs, -far])
    x = x + 3 * torch.cat([torch.ones(17, 1), torch.zeros(1, 1)]) * torch.eye(14)[13]
    whole = greedy_pairs(x.unsqueeze(0), 9)
    assert whole[0][0, -1] == 0
    assert whole[1][0, -1] == 17
    in_blocks()
    assert all(torch.equal(a, b) for a, b in zip(whole, greedy_pairs(x.unsqueeze(0), 9), strict=True))


def test_a_row_is_at_no_distance_to_itself(in_blocks):
    x, rows_ = torch.randn(2, 40, 50) + 100, torch.arange(39, -1, -1).expand(2, -1)
    for _ in range(2):
        distances = Distances(x)
        d2 = torch.cat([distances.of(part) for part in distances.parts], 1)
        to = torch.cat([distances.to(part, rows_) for part in distances.parts], 1)
        assert d2.diagonal(dim1=1, dim2=2).eq(0).all()
        assert to.gather(1, rows_.unsqueeze(1)).eq(0).all()
        assert (d2 > 0).sum() == 2 * 40 * 39
        in_blocks()


def brute_force(x, first, second):
    c = cosine(x, x)[0].triu(1) + torch.full((30, 30), -9.0).tril()
    for a, b in zip(first[0].tolist(), second[0].tolist(), strict=True):
        assert (a, b) == divmod(int(c.argmax()), 30)
        c[[a, b]] = c[:, [a, b]] = -9.0


def test_one_to_one_among_many():
    similarity, host = torch.rand(3, 50).round(decimals=1), torch.randint(0, 9, (3, 50))
    found = one_to_one(similarity, host, 9)
    for b in range(3):
        for h in set(host[b].tolist()):
            own = (host[b] == h).nonzero().flatten()
            assert (found[b] == h).nonzero().flatten().tolist() == [int(own[similarity[b, own].argmax()])]


@every_part
def test_no_matrix_of_all_pairs(work, in_blocks):
    in_blocks(size=32)
    most = []
    for count in (256, 1024):
        with Largest() as made, torch.no_grad():
            work(torch.randn(1, count, 4))
        most.append(made.most)
    assert most[1] < 5 * most[0]
    assert most[1] < 1024 * 1024 // 4


LONG = ("etps", "bat", "tome", "pitome", "kmeans", "dpc-knn")


@pytest.mark.parametrize("method", LONG)
def test_blocks_under_autocast(method, in_blocks):
    """Similarities and distances of blocks of rows are made in float32, too."""
    model = laconic.reduce_(make("plain"), method, keep=0.6, at=[1, 2])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        at_once = model(images("plain"))
        where = laconic.provenance(model).final.where
        in_blocks()
        in_parts = model(images("plain"))
    assert torch.equal(laconic.provenance(model).final.where, where)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-2, atol=1e-2)


@pytest.mark.unchecked
@pytest.mark.parametrize("method", LONG)
def test_blocks_are_exported(method, in_blocks):
    from laconic.exporting import trace

    model = laconic.reduce_(make("plain"), method, keep=0.6, at=[1, 2])
    in_blocks(size=16)
    traced = trace(model)
    for batch in traced.batches:
        found = traced.program.module()(traced.images(batch))
        torch.testing.assert_close(found, model(traced.images(batch)), rtol=1e-5, atol=1e-5)


@pytest.mark.unchecked
@pytest.mark.slow
@every_part
def test_blocks_compile_as_one_graph(work, in_blocks):
    in_blocks(size=16)
    x = torch.randn(2, 40, 8)
    compiled = torch.compile(work, fullgraph=True, backend="eager")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(work(x), compiled(x), strict=True))
