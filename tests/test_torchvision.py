"""torchvision's VisionTransformer: attention that nobody can look at is spelled out."""

import pytest
import torch
from torchvision.models import swin_t

import host_laws
import laconic
from host_laws import WIDE, run
from laconic.backbones.multihead import self_attention
from zoo import ZOO, torchvision_vit

KIND = ZOO["torchvision"]
every = pytest.mark.parametrize("method", WIDE)


@pytest.mark.parametrize("method", ["etps", "dtps", "tome", "bat", "topk"])
def test_keep_1_is_the_identity(method):
    host_laws.keeps_its_answer_where_nothing_is_reduced(KIND, method)


@every
def test_tokens_leave(method):
    host_laws.lets_tokens_leave(KIND, method)


@every
def test_a_batch_equals_its_images_one_by_one(method):
    host_laws.does_not_mix_images(KIND, method)


@every
def test_restore_gives_the_original_back(method):
    host_laws.can_be_undone(KIND, method)


@pytest.mark.parametrize("kind", ["torchvision", "torchvision-stem"])
def test_removed_equals_hidden(kind):
    host_laws.answers_as_if_what_left_were_hidden(ZOO[kind])


@pytest.mark.parametrize("method", ["dtps", "bat"])
def test_gradients_reach_every_parameter(method):
    host_laws.trains(KIND, method)


@pytest.mark.parametrize("kind", ["torchvision", "torchvision-stem"])
def test_its_work_is_counted(kind):
    host_laws.is_counted(ZOO[kind])


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["bat", pytest.param("dtps", marks=pytest.mark.slow)])
def test_one_graph(method):
    host_laws.compiles(KIND, method)


@pytest.mark.unchecked
@pytest.mark.slow
def test_export():
    host_laws.exports(KIND, "etps")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_spelled_out_is_the_modules_own(dropout):
    attn = torch.nn.MultiheadAttention(48, 3, dropout=dropout, batch_first=True)
    torch.nn.init.normal_(attn.in_proj_bias)
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        torch.testing.assert_close(self_attention(attn.eval(), x), attn(x, x, x)[0], rtol=1e-5, atol=1e-6)
        attn.train()
        torch.manual_seed(1)
        dropped = self_attention(attn, x)
    assert torch.equal(dropped, self_attention(attn.eval(), x)) == (dropout == 0)


def test_blocks_without_work_run_their_own_forward():
    model, x = host_laws.reduced(KIND, "topk", at=(2,)), KIND.images()
    seen = []
    for i, layer in enumerate(model.encoder.layers):
        layer.self_attention.register_forward_hook(lambda *_, i=i: seen.append(i))
    run(KIND, model, x)
    assert seen == [0, 1, 3]  # that of block 2 is spelled out


def test_merged_tokens_do_not_reach_its_class_token_unweighted():
    """The head reads the class token alone, so nothing is left to pool."""
    model = host_laws.reduced(KIND, "tome")
    assert model.laconic.pooling == ("token", False)


def test_odd_attention_is_refused():
    model = torchvision_vit()
    model.encoder.layers[1].self_attention.batch_first = False
    with pytest.raises(ValueError, match="batch_first=False"):
        laconic.reduce_(model, "topk", keep=0.7)
    model = torchvision_vit()
    model.encoder.layers[1].self_attention = torch.nn.MultiheadAttention(48, 3, batch_first=True, add_zero_attn=True)
    with pytest.raises(ValueError, match="keys that are not tokens"):
        laconic.reduce_(model, "topk", keep=0.7)


@pytest.mark.unchecked
def test_swin_is_refused_with_the_reason():
    with torch.device("meta"), pytest.raises(TypeError, match="SwinTransformer cannot be reduced: it attends in windows"):
        laconic.reduce_(swin_t(), "topk", keep=0.7)
