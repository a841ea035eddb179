"""Linear layers through oneDNN: the same values and gradients, and where it is used. Dropout by fewer random bits."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration

from utils.fast import cpu
from utils.fast.cpu import HAS_BFLOAT16, Linear, laid_out_weights, multiply, use_fast_layers
from utils.models.encoder import build_small_encoder, load_retriever
from utils.models.encoder_decoder import EncoderDecoder
from utils.models.sources import collate

ROWS = 300
OPERATION = "mkldnn::_linear_pointwise"


@pytest.fixture(autouse=True)
def has_what_is_tested(request, monkeypatch):
    monkeypatch.setattr(cpu, "IS_FASTER", True)  # on a processor of any make
    if not cpu.IS_AVAILABLE and "dropout" not in request.node.name:
        pytest.skip("this PyTorch has no oneDNN")


def pair(inputs=128, outputs=96, bias=True):
    """A linear layer, and one with the same weights through oneDNN."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    ours = copy.deepcopy(plain)
    use_fast_layers(ours)
    return plain, ours


def calls(compute) -> int:
    """How many products oneDNN makes meanwhile."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        compute()
    return sum(event.count for event in profiler.key_averages() if event.key == OPERATION)


def check_close(ours, plain):
    assert (ours - plain).norm() <= 1e-5 * plain.norm()


def gradients(layer, x, outer):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.backward(outer(output))
    return [output.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


def seeded(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1))


CASES = {
    "a matrix": ((ROWS, 128), lambda x: x, seeded),
    "three dimensions": ((3, ROWS, 128), lambda x: x, seeded),
    "more rows than are transposed at once": ((2 * cpu.ROWS_AT_ONCE + 7, 128), lambda x: x, seeded),
    "transposed": ((128, ROWS), lambda x: x.T, seeded),
    "every second row": ((2 * ROWS, 128), lambda x: x[::2], seeded),
    "the gradient of a sum": ((ROWS, 128), lambda x: x, lambda output: torch.ones(()).expand(output.shape)),
    "a transposed gradient": ((ROWS, 128), lambda x: x, lambda output: seeded(output.T).T),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_torch(name, bias):
    shape, view, outer = CASES[name]
    plain, ours = pair(bias=bias)
    x = view(torch.randn(shape))
    theirs, found = gradients(plain, x, outer), []
    assert calls(lambda: found.extend(gradients(ours, x, outer))) >= 3  # forward, and of inputs and weight backward
    for our, their in zip(found, theirs, strict=True):
        check_close(our, their)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(ours, x, outer), strict=True))


def test_gradients_add_up_over_several_backward_passes_and_under_checkpointing():
    plain, ours = pair()
    x = torch.randn(ROWS, 128)
    for layer in (plain, ours):
        layer(x).square().sum().backward()
    plain(2 * x).square().sum().backward()
    checkpoint(ours, 2 * x, use_reentrant=False).square().sum().backward()
    check_close(ours.weight.grad, plain.weight.grad)
    check_close(ours.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "inputs"])
def test_only_what_is_trained_gets_a_gradient_and_its_product(frozen):
    _, ours = pair()
    ours.weight.requires_grad_(frozen not in ("weight", "both"))
    ours.bias.requires_grad_(frozen not in ("bias", "both"))
    x = torch.randn(ROWS, 128, requires_grad=frozen != "inputs")
    output = ours(x)
    assert calls(lambda: output.sum().backward()) == (1 if frozen in ("weight", "both", "inputs") else 2)
    for tensor in (x, ours.weight, ours.bias):
        assert (tensor.grad is not None) == tensor.requires_grad


def test_without_gradients_the_output_has_no_graph():
    plain, ours = pair()
    x = torch.randn(ROWS, 128)
    with torch.no_grad():
        assert not ours(x).requires_grad
        check_close(ours(x), plain(x))


# ---- what PyTorch does as before


class Subclass(torch.Tensor):
    pass


LEFT = {
    "few rows": lambda layer: layer(torch.randn(2, 128)),
    "no rows": lambda layer: layer(torch.randn(0, 128)),
    "double precision": lambda layer: layer.double()(torch.randn(ROWS, 128, dtype=torch.float64)),
    "bf16": lambda layer: layer.bfloat16()(torch.randn(ROWS, 128, dtype=torch.bfloat16)),
    "another device": lambda layer: layer.to("meta")(torch.randn(ROWS, 128, device="meta")),
    "a subclass of tensors": lambda layer: layer(torch.randn(ROWS, 128).as_subclass(Subclass)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_onednn_is_not_for_is_left_to_torch(name):
    _, ours = pair()
    outputs = []
    assert calls(lambda: outputs.append(LEFT[name](ours))) == 0
    assert outputs[0].shape[-1] == 96
    assert outputs[0].requires_grad


def test_under_autocast_products_are_in_its_precision():
    plain, ours = pair()
    x, outputs = torch.randn(ROWS, 128), []
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(lambda: outputs.append(ours(x))) == 0
        assert torch.equal(outputs[0], plain(x))
    assert outputs[0].dtype == torch.bfloat16
    assert calls(lambda: ours(x)) == 1  # the layer does not remember it


def test_inputs_of_the_wrong_width_get_torchs_error():
    _, ours = pair()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(torch.randn(ROWS, 100))


def test_other_kinds_of_linear_layers_keep_their_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.Bilinear(4, 4, 4))
    use_fast_layers(model)
    assert [type(module) for module in model] == [Linear, Doubled, nn.Bilinear]


def test_a_copied_layer_computes_with_its_own_weights():
    _, ours = pair()
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    x = torch.randn(ROWS, 128)
    assert calls(lambda: twin(x)) == 1
    assert twin(x).abs().sum() == 0
    assert ours(x).abs().sum() > 0
    assert ours.state_dict().keys() == nn.Linear(1, 1).state_dict().keys()


@pytest.mark.parametrize("rows", [3, ROWS])
def test_a_product_of_two_matrices_is_that_of_torch(rows):
    a, b = torch.randn(rows, 200), torch.randn(200, 150)
    assert calls(lambda: multiply(a, b)) == (rows == ROWS)
    for x, y in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T)):
        check_close(multiply(x, y), x @ y)


# ---- dropout


def dropout_of(p: float) -> cpu.Dropout:
    model = nn.Sequential(nn.Dropout(p))
    use_fast_layers(model)
    assert type(model[0]) is cpu.Dropout
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_anywhere_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 1001, 64, dtype=dtype).abs() + 1
    y = dropout_of(p)(x)
    assert y.dtype == dtype
    dropped = y == 0
    assert dropped.double().mean().item() == pytest.approx(p, abs=4e-3)
    for dim in ((1, 2), (0, 2), (0, 1)):  # deviations of up to five times the expected one
        shares = dropped.double().mean(dim)
        count = dropped.numel() / len(shares)
        assert (shares - p).abs().max() < 5 * (p * (1 - p) / count) ** 0.5
    together = (dropped[..., 1:] & dropped[..., :-1]).double().mean().item()  # neighbours are of the same draw
    assert together == pytest.approx(p * p, abs=6e-3)
    kept = y[~dropped] / x[~dropped]
    assert (kept.double() * (1 - p) - 1).abs().max() < (1e-4 if dtype == torch.float32 else 1e-2)


def test_dropout_drops_the_same_backward_and_by_the_seed():
    layer, x = dropout_of(0.3), torch.randn(50, 77, requires_grad=True)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(layer(x), layer(x))
    outputs[0].sum().backward()
    torch.testing.assert_close(x.grad * x, outputs[0])


def test_dropout_in_place_is_left_to_torch():
    model, x = nn.Sequential(nn.Dropout(0.5, inplace=True)), torch.ones(100)
    use_fast_layers(model)
    model(x)
    assert 20 < (x == 0).sum() < 80


@pytest.mark.parametrize(("p", "x"), [(0.0, torch.ones(9)), (1.0, torch.ones(9)), (0.5, torch.ones(9, device="meta"))])
def test_dropout_of_nothing_or_all_or_elsewhere_is_left_to_torch(p, x):
    y = dropout_of(p)(x)
    assert y.shape == x.shape and y.device == x.device
    assert y.is_meta or torch.equal(y, torch.full((9,), 1 - p))


def test_dropout_keeps_everything_in_evaluation():
    x = torch.randn(5, 4)
    assert torch.equal(dropout_of(0.5).eval()(x), x)


# ---- the models


def summarizer_and_batch(dropout=0.0):
    torch.manual_seed(0)
    config = BartConfig(vocab_size=300, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256,
                        dropout=dropout)  # fmt: skip
    ids = torch.randint(4, 300, (6, 64)).tolist()
    return EncoderDecoder(BartForConditionalGeneration(config)), collate([[row] for row in ids], ids, pad_token_id=1)


def train(summarizer, batch):
    summarizer.zero_grad()
    loss, _ = summarizer(**batch, label_smoothing_factor=0.1)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in summarizer.parameters()]


def test_a_summarizer_trains_through_onednn_with_the_same_loss_and_gradients(monkeypatch):
    summarizer, batch = summarizer_and_batch()
    results = []
    # of 16 layers, and of the vocabulary: forward, and for inputs and weight backward
    assert calls(lambda: results.append(train(summarizer, batch))) == 3 * 17
    monkeypatch.setattr(cpu, "IS_AVAILABLE", False)
    assert calls(lambda: results.append(train(summarizer, batch))) == 0
    (our_loss, ours), (loss, theirs) = results
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=0)
    check_close(torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in theirs]))


def test_a_summarizer_does_not_where_mkl_is_faster(monkeypatch):
    summarizer, batch = summarizer_and_batch()
    monkeypatch.setattr(cpu, "IS_FASTER", False)
    assert calls(lambda: train(summarizer, batch)) == 0


def test_a_summarizer_in_bf16_does_not():
    summarizer, batch = summarizer_and_batch()

    def forward_and_backward():
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = summarizer(**batch, label_smoothing_factor=0.1)
        loss.backward()

    assert calls(forward_and_backward) == 0


def test_dropout_of_a_summarizers_layers_is_the_fast_one_in_training_alone(monkeypatch):
    summarizer, batch = summarizer_and_batch(dropout=0.2)
    shapes, fast = [], cpu.dropout
    monkeypatch.setattr(cpu, "dropout", lambda x, **options: shapes.append(tuple(x.shape)) or fast(x, **options))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(train(summarizer, batch)[0])
    assert losses[0] == losses[1] != losses[2]
    # 384 tokens of source and of target: after the embeddings, and of a layer attention, GELU and output, and attention
    # to the source
    assert shapes == 3 * [(1, 384, width) for width in (128, 128, 256, 128, 128, 128, 128, 256, 128)]
    shapes.clear()
    summarizer.eval()
    assert train(summarizer, batch)[0] == train(summarizer, batch)[0]
    assert not shapes


def test_a_summarizer_generates_through_onednn():
    summarizer, batch = summarizer_and_batch()
    del batch["labels"]
    assert calls(lambda: summarizer.generate(**batch, num_beams=1, max_new_tokens=2)) >= 6  # the encoder's layers


def test_a_retriever_uses_onednn_when_built_and_when_loaded_and_saves_the_same(tmp_path):
    torch.manual_seed(0)
    built = build_small_encoder(["one two three four five"], layers=1)
    built.save(str(tmp_path))
    loaded = load_retriever(str(tmp_path))
    features = {"input_ids": torch.full((8, 64), 5), "attention_mask": torch.ones(8, 64, dtype=torch.long)}
    embeddings = []

    def encode(model):
        embeddings.append(model.eval()(dict(features))["sentence_embedding"])

    assert [calls(lambda model=model: encode(model)) for model in (built, loaded)] == [6, 6]
    assert torch.equal(*embeddings)


# ---- weights laid out once


@pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN computes bfloat16 on processors with AVX-512 only")
def test_laid_out_weights_give_what_autocast_gives_and_only_while_they_are(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.GELU(), torch.nn.Linear(96, 40, bias=False))
    use_fast_layers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 7, 48)
    products = []
    monkeypatch.setattr(cpu, "_onednn", lambda *given, times=cpu._onednn: products.append(1) or times(*given))

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = run()
    assert not products and expected.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), laid_out_weights(model):
        assert torch.allclose(run().float(), expected.float(), rtol=1e-2, atol=1e-3)
        assert len(products) == 2
        loss = model(x).square().sum()  # with gradients the weights themselves are used
        loss.backward()
        assert len(products) == 2 and model[0].weight.grad.abs().sum() > 0
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # as a model may ask for some of its layers
            assert model(x).dtype == torch.float32
        assert model.state_dict().keys() == before.keys()

    with torch.no_grad():
        model[2].weight.neg_()
    assert torch.equal(run(), -expected)
    assert len(products) == 2 and "laid_out" not in model[0].__dict__


@pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN computes bfloat16 on processors with AVX-512 only")
def test_weights_that_are_held_in_bfloat16_are_laid_out_as_those_in_float32(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 40, bias=False))
    use_fast_layers(model)
    held = copy.deepcopy(model)
    for layer in held:
        layer.weight.data = layer.weight.data.bfloat16()
    x, products = torch.randn(3, 7, 48), []
    monkeypatch.setattr(cpu, "_onednn", lambda *given, times=cpu._onednn: products.append(1) or times(*given))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), laid_out_weights(model), laid_out_weights(held):
        assert torch.equal(model(x), held(x))
    assert len(products) == 4


def test_weights_are_not_laid_out_in_float32_or_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(48, 96))
    use_fast_layers(model)
    x = torch.randn(5, 48)
    with torch.no_grad(), laid_out_weights(model):
        assert model[0].laid_out is None and torch.allclose(
            model(x), torch.nn.functional.linear(x, *model.parameters())
        )
    with pytest.raises(ValueError, match="midway"), torch.autocast("cpu", torch.bfloat16), laid_out_weights(model):
        assert (model[0].laid_out is not None) == HAS_BFLOAT16
        raise ValueError("midway")
    assert model[0].laid_out is None
