"""The verbs against a few lines of plain Python."""

import pytest
import torch

from laconic.core import gather
from laconic.core.gather import add_rows, gather_rows
from laconic.core.tokens import Tokens


def tokens(batch=2, patches=6, channels=3, prefix=1):
    return Tokens.start(torch.randn(batch, prefix + patches, channels), prefix, True)


def test_start_holds_every_patch():
    t = tokens()
    assert len(t) == 6
    assert t.token_of_patch.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert t.size.tolist() == [[1.0] * 6] * 2
    assert torch.equal(t.patches, t.x[:, 1:])


def test_keep():
    t = tokens()
    index = torch.tensor([[4, 0, 2], [5, 1, 3]])
    kept = t.keep(index)
    for b in range(2):
        assert torch.equal(kept.x[b, 0], t.x[b, 0])
        for new, old in enumerate(index[b].tolist()):
            assert torch.equal(kept.patches[b, new], t.patches[b, old])
            assert kept.token_of_patch[b, old] == new
    assert (kept.token_of_patch >= 0).sum(1).tolist() == [3, 3]
    assert torch.equal(kept.origin_index, index)
    assert not kept.merged


def test_merge_sums_drops_and_follows():
    t = tokens()
    dst = torch.tensor([[0, 1, 0, -1, 1, 0], [-1, 0, 0, 1, 1, 1]])
    weight, lead = torch.rand(2, 6), torch.tensor([[5, 1], [2, 3]])
    merged = t.merge(dst, weight, lead)
    for b in range(2):
        for m in range(2):
            members = [i for i in range(6) if dst[b, i] == m]
            expected = sum(weight[b, i] * t.patches[b, i] for i in members)
            torch.testing.assert_close(merged.patches[b, m], expected)
            assert merged.size[b, m] == len(members)
    assert torch.equal(merged.token_of_patch, dst)
    assert torch.equal(merged.origin_index, lead)
    assert merged.merged


def test_what_travels_follows_its_token():
    t = tokens()
    t = t.replace(attn_scale=torch.rand(2, 6), keep_mask=torch.rand(2, 6), per_token={"note": torch.randn(2, 6, 4)})
    index = torch.tensor([[3, 1], [0, 5]])
    dst = torch.tensor([[1, 1, 0, 0, 1, 1]] * 2)
    for after in (t.keep(index), t.merge(dst, torch.ones(2, 6), index)):
        assert torch.equal(after.attn_scale, t.attn_scale.gather(1, index))
        assert torch.equal(after.keep_mask, t.keep_mask.gather(1, index))
        assert torch.equal(after.per_token["note"], gather_rows(t.per_token["note"], index))


def test_verbs_compose():
    t = tokens()
    first = t.merge(torch.tensor([[0, 0, 1, 2, 3, 3]] * 2), torch.ones(2, 6), torch.tensor([[1, 2, 3, 4]] * 2))
    second = first.keep(torch.tensor([[3, 0], [2, 1]]))
    assert second.token_of_patch.tolist() == [[1, 1, -1, -1, 0, 0], [-1, -1, 1, 0, -1, -1]]
    assert second.size.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert second.origin_index.tolist() == [[4, 1], [3, 2]]


def test_mix_conserves_mass():
    t = tokens()
    matrix = torch.rand(2, 3, 6).softmax(2)
    mixed = t.mix(matrix)
    torch.testing.assert_close(mixed.patches, matrix @ t.patches)
    torch.testing.assert_close(mixed.size.sum(1), torch.full((2,), 6.0))
    assert torch.equal(mixed.token_of_patch, matrix.argmax(1))
    assert torch.equal(mixed.x[:, 0], t.x[:, 0])


def test_join():
    t = tokens().replace(per_token={"note": torch.randn(2, 6, 2)})
    index = torch.tensor([[4, 0, 2], [5, 1, 3]])
    outside = torch.tensor([[i for i in range(len(t)) if i not in row] for row in index.tolist()])
    kept, parked = t.keep(index), t.keep(outside)
    assert len(kept) == len(parked) == 3
    joined = kept.join(parked)
    assert torch.equal(joined.dense(joined.patches), t.patches)
    assert torch.equal(joined.dense(joined.per_token["note"]), t.per_token["note"])
    assert joined.size.tolist() == [[1.0] * 6] * 2


def test_fade_keeps_the_shape_and_hands_patches_over():
    t = tokens()
    alive = torch.tensor([[1.0, 0, 1, 0, 1, 1]] * 2)
    dst = torch.tensor([[0, 0, 2, -1, 4, 5]] * 2)
    faded = t.soft_drop(alive, dst)
    assert len(faded) == 6
    assert faded.size.tolist() == [[2.0, 0, 1, 0, 1, 1]] * 2
    assert faded.token_of_patch.tolist() == dst.tolist()
    assert torch.equal(faded.x, t.x)


def test_dense_fills_what_was_dropped():
    t = tokens().keep(torch.tensor([[1], [2]]))
    dense = t.dense(t.patches, fill=-7.0)
    assert torch.equal(dense[0, 1], t.patches[0, 0])
    assert (dense[0, 0] == -7).all()


def test_tokens_do_not_change():
    t = tokens()
    before = t.x.clone()
    t.keep(torch.tensor([[0], [1]]))
    t.merge(torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6), torch.tensor([[0], [1]]))
    assert torch.equal(t.x, before)
    with pytest.raises(AttributeError):
        t.x = before


def test_add_rows_is_the_same_by_product_and_by_index():
    values, dst = torch.randn(2, 6, 3), torch.tensor([[0, 1, 0, 3, 1, 0], [3, 3, 3, 3, 3, 3]])
    chosen = dst.unsqueeze(1) == torch.arange(4).view(1, 4, 1)
    torch.testing.assert_close(add_rows(values, dst, 4), chosen.float() @ values)
    meta = add_rows(values.to("meta"), dst.to("meta"), 4)  # the way of every device but the CPU
    assert meta.shape == (2, 4, 3)


@pytest.mark.parametrize("limits", [{}, {"WHOLE": 4, "ROWS": 2}])
def test_add_rows_by_product_is_the_same_with_a_row_of_each_sum(limits, monkeypatch):
    values, dst = torch.randn(2, 6, 3), torch.tensor([[0, 1, 0, 2, 1, 0], [2, 2, 0, 1, 2, 2]])
    lead = torch.tensor([[5, 1, 3], [2, 3, 4]])
    expected = add_rows(values, dst, 3)
    for name, value in {"_exporting": lambda: True, **limits}.items():
        monkeypatch.setattr(gather, name, value)
    torch.testing.assert_close(add_rows(values, dst, 3, lead), expected)
    torch.testing.assert_close(add_rows(values[..., 0], dst, 3, lead), expected[..., 0])
    order = torch.tensor([[2, 0, 1]] * 2)
    same = add_rows(values[:, :3], order, 3, order.argsort(1))  # nothing to add
    assert torch.equal(same, gather_rows(values[:, :3], order.argsort(1)))


def test_take_is_a_gather():
    values, index = torch.randn(3, 5, 2, 2), torch.randint(0, 5, (3, 4))
    expected = torch.stack([values[b, index[b]] for b in range(3)])
    assert torch.equal(gather_rows(values, index), expected)
    assert torch.equal(gather_rows(values[..., 0, 0], index), expected[..., 0, 0])


def test_fading_fills_dropped_patches_as_keeping_does():
    """``dropped`` and ``similar`` are kept track of where tokens leave, and where they are only hidden."""
    hard = soft = tokens(3, 12, 8).replace(dropped=torch.zeros(3, 12, 8), similar=torch.arange(12).expand(3, -1))
    stays = torch.arange(12).expand(3, -1)
    for count in (7, 4):
        chosen = torch.stack([torch.randperm(stays.shape[1])[:count].sort().values for _ in range(3)])
        hard, stays = hard.keep(chosen), stays.gather(1, chosen)
        alive = torch.zeros(3, 12).scatter(1, stays, 1.0)
        soft = soft.soft_drop(alive, torch.where(alive > 0, torch.arange(12), -1))
        soft = soft.replace(x=torch.randn(3, 13, 8))
        hard = hard.replace(x=torch.cat([soft.x[:, :1], soft.rows(stays)], 1))
        for left in (soft, soft.drop_hidden()):
            assert torch.equal(left.dropped, hard.dropped)
            assert torch.equal(left.origin_index.gather(1, left.similar), hard.origin_index.gather(1, hard.similar))
    assert ((soft.dropped.abs().sum(2) > 0) == (soft.token_of_patch < 0)).all()
