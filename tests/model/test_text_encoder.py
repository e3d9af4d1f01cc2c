"""The trunk for text: padding, buckets, dropout, pooling, and what it refuses."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mtrain.config import ModelConfig
from mtrain.data.tokens import PADDING, SECOND
from mtrain.errors import UserError
from mtrain.model import text
from mtrain.model.dropout import row_keys
from mtrain.model.text import TextEncoder
from mtrain.model.trunks import build_shared, check_features

LENGTHS = [3, 12, 7, 1, 5, 11, 2, 2, 8]
SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"model_type": "bert", "intermediate_size": 24, "max_position_embeddings": 16} | SIZE
GPT2 = {"model_type": "gpt2", "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1} | SIZE
LLAMA = {"model_type": "llama", "intermediate_size": 24, "num_key_value_heads": 2} | SIZE
VIT = {
    "model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
}  # fmt: skip


def made(config=BERT, seed=0, **options):
    torch.manual_seed(seed)
    return TextEncoder(12, config=config, **options)


def texts(lengths=LENGTHS, seed=0):
    x_BL = torch.full((len(lengths), 12), float(PADDING))
    draw = torch.Generator().manual_seed(seed)
    for row, length in zip(x_BL, lengths, strict=True):
        row[:length] = torch.randint(4, 40, (length,), generator=draw)
    return x_BL


@pytest.mark.parametrize("config", [BERT, GPT2, LLAMA, T5], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_a_row_depends_neither_on_its_padding_nor_on_other_rows(config, pool):
    trunk, x_BL = made(config, pool=pool, dropout=0.0).train(), texts()
    expected = []
    for x, length in zip(x_BL, LENGTHS, strict=True):  # without padding and without a mask
        (h_LD,) = trunk.model(input_ids=x[None, :length].long()).last_hidden_state
        expected.append({"mean": h_LD.mean(0), "cls": h_LD[0], "last": h_LD[-1]}[pool])
    for buckets in (1, 3, 20):
        trunk.buckets = buckets
        torch.testing.assert_close(trunk(x_BL), torch.stack(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trunk(F.pad(x_BL, (0, 4), value=PADDING)), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trunk.eval()(x_BL), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_the_buckets():
    x_BL, grads = texts(), []
    for buckets in (1, 4):
        trunk = made(buckets=buckets, dropout=0.0)
        trunk(x_BL).square().sum().backward()
        grads.append({name: p.grad for name, p in trunk.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_each_bucket_is_cut_to_its_longest_row(monkeypatch):
    trunk, seen = made(buckets=3), []
    encode = trunk._encode
    monkeypatch.setattr(trunk, "_encode", lambda x: seen.append(tuple(x.shape)) or encode(x))
    trunk(texts())
    assert seen == [(3, 2), (3, 7), (3, 12)]  # of lengths 1 2 2, 3 5 7, 8 11 12


def test_a_batch_with_fewer_rows_than_buckets_runs_all_of_them(monkeypatch):
    trunk, calls = made(buckets=4), []
    trunk.model.register_forward_hook(lambda *_: calls.append(1))
    z_BD = trunk(texts([]))
    assert z_BD.shape == (0, 16)
    assert len(calls) == 4
    z_BD.sum().backward()  # every rank has a gradient to add up
    assert all(p.grad is not None and not p.grad.any() for p in trunk.parameters() if p.requires_grad)
    assert trunk(texts([2])).shape == (1, 16)
    assert len(calls) == 8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_depends_on_rows_and_not_on_how_they_are_dealt(checkpointing):
    x_BL, keys_B = texts(), row_keys(0, 3, torch.arange(len(LENGTHS)))
    found = []
    for parts in ([slice(0, 9)], [slice(0, 4), slice(4, 9)]):
        trunk = made(dropout=0.3, gradient_checkpointing=checkpointing).train()
        z_BD = torch.cat([trunk(x_BL[part], keys_B[part]) for part in parts])
        z_BD.square().sum().backward()
        found.append((z_BD, trunk.model.encoder.layer[0].output.dense.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (found[0][0] - trunk.eval()(x_BL)).abs().max() > 0.1


def test_gradient_checkpointing_changes_no_gradient():
    x_BL, keys_B = texts(), row_keys(0, 3, torch.arange(len(LENGTHS)))
    grads = []
    for checkpointing in (False, True):
        trunk = made(dropout=0.3, gradient_checkpointing=checkpointing).train()
        trunk(x_BL, keys_B).square().sum().backward()
        grads.append([p.grad for p in trunk.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_second_sentences_get_their_own_token_type():
    trunk = made().eval()
    x_BL = texts([6])
    x_BL[0, 3:6] += SECOND
    ids, types = torch.where(x_BL >= SECOND, x_BL - SECOND, x_BL)[:, :6].long(), torch.tensor([[0, 0, 0, 1, 1, 1]])
    expected = trunk.model(input_ids=ids, token_type_ids=types).last_hidden_state.mean(1)
    torch.testing.assert_close(trunk(x_BL), expected)
    assert not torch.allclose(trunk(x_BL), trunk(torch.where(x_BL >= SECOND, x_BL - SECOND, x_BL)))


def test_what_is_not_used_or_frozen_is_not_trained():
    trunk = made(freeze=["embeddings.*", "encoder.layer.0.*"])
    trained = {name for name, p in trunk.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("encoder.layer.1.") for name in trained)
    assert not trunk.model.pooler.dense.weight.requires_grad


def test_dropout_is_as_the_configuration_says_or_as_asked_for():
    rates = [m.p for m in made(BERT | {"hidden_dropout_prob": 0.25}).model.modules() if isinstance(m, text._KeyedDropout)]
    assert sorted(set(rates)) == [0.0, 0.25]
    trunk = made(dropout=0.4, attention_dropout=0.2)
    assert (trunk.model.config.hidden_dropout_prob, trunk.model.config.attention_probs_dropout_prob) == (0.4, 0.2)


def test_pretrained_weights_are_read_from_a_folder(tmp_path):
    trunk = made()
    trunk.model.save_pretrained(tmp_path)
    again = TextEncoder(12, model=str(tmp_path)).eval()
    torch.testing.assert_close(again(texts()), trunk.eval()(texts()))


def test_the_start_depends_on_the_seed_alone():
    config = ModelConfig(trunk={"class_path": "TextEncoder", "init_args": {"config": BERT}})
    one, two, other = (build_shared(config, 12, seed).trunk for seed in (0, 0, 1))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give model (a hub name or folder) or config (for new weights), one of the two"),
        ({"model": "a", "config": BERT}, "one of the two"),
        ({"model": "no/such/folder"}, "model 'no/such/folder' cannot be loaded ("),
        ({"model": "~/no/such/folder"}, "model '~/no/such/folder': no such file or folder; mend the path"),
        ({"config": {"hidden_size": 16}}, "config lacks model_type, expected one such as bert"),
        ({"config": {"model_type": "brt"}}, "config: unknown model_type 'brt'; did you mean '"),
        ({"config": BERT | {"hiden_size": 3}}, "unknown option 'hiden_size'; did you mean 'hidden_size'?"),
        ({"config": BERT | {"num_attention_heads": 3}}, "makes no model (The hidden size"),
        (
            {"config": BERT | {"max_position_embeddings": 8}},
            "inputs of 12 numbers, but the model takes texts of 8 tokens; lower max_length",
        ),
        ({"config": VIT}, "ViTModel fails on a text of 12 tokens ("),
        ({"config": BERT, "buckets": 0}, "buckets is 0, expected at least 1"),
        ({"config": BERT, "freeze": ["layers.*"]}, "no parameter 'layers.*'"),
        ({"config": T5, "dropout": 1.5}, "dropout is 1.5, expected a probability, at least 0 and below 1"),
        ({"config": LLAMA, "attention_dropout": 2}, "attention_dropout is 2, expected a probability"),
        ({"config": LLAMA, "dropout": 0.1}, "dropout is 0.1, but a llama has none; leave it out"),
        ({"config": T5, "attention_dropout": 0.1}, "attention_dropout is 0.1, but a t5 has none; leave it out"),
    ],
)
def test_bad_options_are_said_in_one_line(options, message):
    with pytest.raises(UserError) as error:
        TextEncoder(12, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_features_and_trunks_that_do_not_fit_each_other_are_refused():
    class Ids:
        packed, state = "token ids", {"vocabulary": 41, "columns": ["body"]}

    class Numbers:
        packed, state = "", {"columns": ["x"]}

    encoder = build_shared(ModelConfig(trunk={"class_path": "TextEncoder", "init_args": {"config": BERT}}), 12, 0)
    mlp = build_shared(ModelConfig(), 12, 0)
    with pytest.raises(UserError, match=r"inputs.body: Ids gives token ids, which trunk MLP cannot read; use TextEncoder"):
        check_features(mlp, [Ids()])
    with pytest.raises(
        UserError, match=r"model.trunk: TextEncoder reads token ids, which no feature of inputs gives; use Tokens"
    ):
        check_features(encoder, [Numbers()])
    with pytest.raises(UserError, match=r"TextEncoder reads one feature of token ids, but inputs has 2 features"):
        check_features(encoder, [Ids(), Numbers()])
    with pytest.raises(
        UserError, match=r"inputs.body: the tokenizer has ids up to 40, but the embedding of TextEncoder has 40 rows"
    ):
        check_features(encoder, [Ids()])
    Ids.state["vocabulary"] = 40
    check_features(encoder, [Ids()])
    check_features(mlp, [Numbers()])


def test_ids_are_exact_in_float32():
    ids = np.arange(SECOND - 100, 2 * SECOND, 997)
    assert (ids.astype(np.float32).astype(np.int64) == ids).all()
