"""
lora.py: identity, merging, gradients, and files exchanged with PEFT and transformers in both directions.

    python -m pytest tests/test_lora.py
"""
import copy
import itertools
import json

import pytest
import torch
from conftest import page
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from test_model import LLAMA3, TOKENS, distance, edit, hf_folder, meta_folder, tiny_hf, tiny_llama, tiny_sllama

from lib.adapter import TARGETS
from lib.linear import Linear
from lib.program import BadInput
from lib.tensors import to_hf
from lib.weights import write_hf
from lora import LoRALinear, apply_lora, load_lora, main, merge_lora, save_lora
from model import LLaMA

ALL = list(TARGETS)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # among transformers and peft


def with_lora(llama, rank=3, alpha=5, targets=ALL, dropout=0.0):
    """apply_lora with a B that is not zero, as after training."""
    apply_lora(llama, rank, alpha, targets, dropout)
    torch.manual_seed(7)
    for name, p in llama.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) * 0.2
    return llama


@torch.no_grad()
def difference(a, b):
    return (a(TOKENS) - b(TOKENS)).abs().max().item()

# ---------------------------------------------------------------------------------------------------------------------
# The layer

def test_starts_as_the_identity():
    plain = tiny_llama()
    lora = apply_lora(tiny_llama(), 4, 8, ALL)
    assert torch.equal(plain(TOKENS), lora(TOKENS))
    # with A zero too nothing would ever learn
    assert all(m.lora_A.abs().sum() > 0 for m in lora.modules() if isinstance(m, LoRALinear))


def test_update_by_hand():
    linear = Linear(4, 3, True)
    lora = LoRALinear(linear, 2, 6.0)
    torch.nn.init.normal_(lora.lora_B)
    x = torch.randn(5, 4)
    expected = x @ (linear.weight + 6 / 2 * lora.lora_B @ lora.lora_A).T + linear.bias
    torch.testing.assert_close(lora(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=["llama", "qwen2", "qwen3"])
def test_merged_equals_unmerged(kind):
    lora = with_lora(tiny_llama(**kind))
    merged = merge_lora(copy.deepcopy(lora))
    assert difference(lora, merged) < 1e-4 < 1e-1 < difference(merged, tiny_llama(**kind))
    assert merged.state_dict().keys() == tiny_llama(**kind).state_dict().keys()
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())


def test_merging_rounds_once():
    lora = with_lora(tiny_llama().bfloat16(), alpha=0.05)
    before = {f"layers.{i}.attention.{t}": getattr(lora.layers[i].attention, t) for i in (0, 1) for t in ("wq", "wv")}
    merged = merge_lora(copy.deepcopy(lora))
    for name, m in before.items():
        exact = m.weight.double() + 0.05 / 3 * (m.lora_B.double() @ m.lora_A.double())
        after = merged.get_submodule(name).weight
        assert after.dtype == torch.bfloat16
        # no farther from the exact sum than half a step of bfloat16 (8 bits); product and sum in bfloat16 would be
        assert ((after.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-8).all()
        assert not torch.equal(after, m.weight)


def test_only_the_update_learns():
    lora = with_lora(tiny_llama().requires_grad_(False), rank=2)
    lora(TOKENS).square().mean().backward()
    for name, p in lora.named_parameters():
        if "lora_" in name:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None, name


def test_every_B_has_a_gradient_from_the_first_step_on():
    lora = apply_lora(tiny_llama().requires_grad_(False), 2, 4, ALL)
    lora(TOKENS).square().mean().backward()
    grads = [m.lora_B.grad for m in lora.modules() if isinstance(m, LoRALinear)]
    assert len(grads) == 7 * 2 and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_targets():
    for targets in itertools.chain.from_iterable(itertools.combinations(ALL, n) for n in range(1, 8)):
        llama = apply_lora(tiny_llama(), 2, 4, list(targets))
        found = {name.split(".")[-1] for name, m in llama.named_modules() if isinstance(m, LoRALinear)}
        assert found == set(targets)
    with pytest.raises(BadInput, match="q_proj"):
        apply_lora(tiny_llama(), 2, 4, ["wq", "q_proj"])
    for rank, targets in ((2, []), (0, ["wq"])):
        with pytest.raises(BadInput, match="lora_rank"):
            apply_lora(tiny_llama(), rank, 4, targets)
    with pytest.raises(BadInput, match="already"):  # a second LoRA would throw the first one away
        apply_lora(apply_lora(tiny_llama(), 2, 4, ["wq"]), 2, 4, ["wv"])


def test_fp32_updates_beside_bf16_weights():
    lora = with_lora(tiny_llama().bfloat16())
    assert {p.dtype for name, p in lora.named_parameters() if "lora_" in name} == {torch.float32}
    assert lora(TOKENS).dtype == torch.bfloat16


def test_dropout_is_for_training_alone():
    lora = with_lora(tiny_llama(), dropout=0.5)  # tiny_llama is in eval mode, and so is what is put into it
    assert torch.equal(lora(TOKENS), lora(TOKENS))
    lora.train()
    assert not torch.equal(lora(TOKENS), lora(TOKENS))


def test_dropout_is_on_what_goes_into_A():
    """The frozen part sees all of x, the update what is left of it, larger by as much as is left out."""
    linear = Linear(40, 3, True)
    lora, x = LoRALinear(linear, 2, 6.0, dropout=0.25), torch.randn(500, 40)
    torch.nn.init.normal_(lora.lora_B)
    torch.manual_seed(3)
    left = torch.nn.functional.dropout(torch.ones_like(x), 0.25)  # zeros, and 4/3 where a number stays
    torch.manual_seed(3)
    expected = linear(x) + 3 * (left * x) @ lora.lora_A.T @ lora.lora_B.T
    torch.testing.assert_close(lora(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_drops_out_where_the_one_it_replaces_would():
    assert LoRALinear(Linear(4, 3), 2, 6.0).dropout.p == 0
    for training in (True, False):
        lora = LoRALinear(Linear(4, 3).train(training), 2, 6.0, 0.5)
        assert lora.training == lora.dropout.training == training


def test_first_values_are_as_peft_has_them():
    lora = LoRALinear(Linear(400, 300, bias=False), 50, 6.0)
    a = lora.lora_A.detach() * 400**0.5  # evenly between -1/sqrt(in) and 1/sqrt(in)
    assert lora.lora_A.shape == (50, 400) and lora.lora_B.shape == (300, 50) and not lora.lora_B.any()
    assert 0.99 < a.max() <= 1.0001 and -1.0001 <= a.min() < -0.99
    assert a.std().item() == pytest.approx(3**-0.5, rel=0.02)

# ---------------------------------------------------------------------------------------------------------------------
# PEFT's files

SUBSETS = [ALL, ["wq", "wk", "wv", "wo"], ["w1", "w2", "w3"], ["wv", "w2"]]
comma = lambda x: ",".join(x) if isinstance(x, list) else x


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", SUBSETS, ids=comma)
def test_peft_reads_what_we_save(tmp_path, targets, kind):
    peft = pytest.importorskip("peft")
    base = hf_folder(tmp_path / "base", kind=kind)
    llama = with_lora(LLaMA.from_pretrained(str(tmp_path / "base")), targets=targets)
    save_lora(llama, str(tmp_path / "lora"), "base")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    assert distance(theirs, llama) < 1e-4
    assert theirs.peft_config["default"].r == 3 and theirs.peft_config["default"].lora_alpha == 5
    # and we read it back
    assert difference(llama, load_lora(LLaMA.from_pretrained(str(tmp_path / "base")), str(tmp_path / "lora"))) == 0


def peft_saves(folder, targets, **options):
    """PEFT makes, fills and saves a LoRA on a tiny model -> its own model."""
    peft = pytest.importorskip("peft")
    base = hf_folder(folder / "base")
    modules = [to_hf(t) for t in targets]
    config = peft.LoraConfig(**{**dict(r=3, lora_alpha=5, target_modules=modules), **options})
    theirs = peft.get_peft_model(base, config).eval()
    torch.manual_seed(8)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) * 0.2
    theirs.save_pretrained(folder / "lora")
    return theirs


@pytest.mark.parametrize("targets", SUBSETS, ids=comma)
def test_we_read_what_peft_saves(tmp_path, targets):
    theirs = peft_saves(tmp_path, targets)  # with every option of the installed version at its default
    llama = load_lora(LLaMA.from_pretrained(str(tmp_path / "base")), str(tmp_path / "lora"))
    assert distance(theirs, llama) < 1e-4
    assert distance(theirs, merge_lora(llama)) < 1e-4
    # it is not the base that was compared
    assert difference(llama, LLaMA.from_pretrained(str(tmp_path / "base"))) > 1e-1
    (tmp_path / "lora/adapter_model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "lora", safe_serialization=False)  # adapter_model.bin, as PEFT wrote it once
    assert distance(theirs, load_lora(LLaMA.from_pretrained(str(tmp_path / "base")), str(tmp_path / "lora"))) < 1e-4


def test_dropout_is_as_peft_has_it(tmp_path):
    """While training, from the same seed: every layer leaves the same numbers out."""
    theirs = peft_saves(tmp_path, ALL, lora_dropout=0.3).train()
    ours = load_lora(LLaMA.from_pretrained(str(tmp_path / "base")), str(tmp_path / "lora")).train()
    logits = []
    for model in (lambda tokens: theirs(tokens).logits, ours, ours):
        torch.manual_seed(len(logits) // 2)
        logits.append(model(TOKENS).detach())
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[1] - logits[2]).abs().max() > 1e-1  # the last had another seed


def test_configuration_there_and_back(tmp_path):
    """All that PEFT needs is written, and what was read is written again."""
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    save_lora(with_lora(tiny_llama(), rank=2, alpha=2.5, targets=["wv", "w2"], dropout=0.05), first, "some/llm")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config == {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2.5, "lora_dropout": 0.05,
                      "target_modules": ["v_proj", "down_proj"], "bias": "none", "fan_in_fan_out": False,
                      "inference_mode": True, "base_model_name_or_path": "some/llm"}
    llama = load_lora(tiny_llama(), first)
    found = {name.split(".")[-1]: m for name, m in llama.named_modules() if isinstance(m, LoRALinear)}
    assert found.keys() == {"wv", "w2"} and all((m.scaling, m.dropout.p) == (1.25, 0.05) for m in found.values())
    save_lora(llama, second, "some/llm")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()) == config
    a, b = (load_file(f"{folder}/adapter_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and len(a) == 2 * 2 * 2 and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("option, value, unset", [
    ("use_rslora", True, False), ("use_dora", True, False), ("use_qalora", True, False), ("lora_bias", True, False),
    ("fan_in_fan_out", True, False), ("bias", "all", "none"), ("exclude_modules", ["q_proj"], []),
    ("modules_to_save", ["lm_head"], []), ("target_parameters", ["a"], []), ("layers_to_transform", 1, None),
    ("layers_pattern", "layers", None), ("rank_pattern", {"q_proj": 4}, {}), ("alpha_pattern", {"q_proj": 4}, {}),
    ("corda_config", {"a": 1}, None), ("eva_config", {"rho": 2.0}, None), ("loftq_config", {"loftq_bits": 4}, {}),
    ("megatron_config", {"a": 1}, None), ("arrow_config", {"a": 1}, None), ("init_lora_weights", "loftq", "eva"),
    ("init_lora_weights", "corda", "orthogonal"), ("init_lora_weights", "pissa", "gaussian"), ("tomorrow", 0.5, 0)])
def test_an_option_that_is_set_is_refused_and_one_that_is_not_is_fine(tmp_path, option, value, unset):
    folder = str(tmp_path)
    save_lora(with_lora(tiny_llama(), targets=["wq"]), folder)
    for harmless in (unset, None):
        with edit(tmp_path, "adapter_config.json") as c:
            c[option] = harmless
        load_lora(tiny_llama(), folder)
    with edit(tmp_path, "adapter_config.json") as c:
        c[option] = value
    with pytest.raises(BadInput, match=f"adapter_config.json: {option}=.* is not implemented"):
        load_lora(tiny_llama(), folder)


@pytest.mark.parametrize("options", [
    dict(lora_dropout=0.3), dict(init_lora_weights="gaussian"), dict(init_lora_weights=False),
    dict(target_modules="all-linear", task_type="CAUSAL_LM"), dict(target_modules=r".*\.(q_proj|up_proj)")],
    ids=lambda x: comma(list(x)))
def test_options_of_peft_that_change_nothing(tmp_path, options):
    theirs = peft_saves(tmp_path, ["wq", "w3"], **options)
    assert distance(theirs, load_lora(LLaMA.from_pretrained(str(tmp_path / "base")), str(tmp_path / "lora"))) < 1e-4


@pytest.mark.parametrize("option, value", [
    ("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
    ("layers_to_transform", [0]), ("layers_to_transform", 1), ("bias", "all"), ("bias", "lora_only"),
    ("modules_to_save", ["embed_tokens"]), ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"), ("lora_bias", True), ("layer_replication", [[0, 2], [1, 2]]),
    ("trainable_token_indices", [1, 2]), ("fan_in_fan_out", True)])
def test_options_of_peft_that_we_lack_are_refused_by_name(tmp_path, option, value):
    # some options need other layers, or are refused by some version of PEFT: of those the saved file is edited
    if option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"):
        peft_saves(tmp_path, ["wq", "wv"], **{option: value})
    else:
        peft_saves(tmp_path, ["wq", "wv"])
        with edit(tmp_path / "lora", "adapter_config.json") as c:
            assert option in c
            c[option] = value
    with pytest.raises(BadInput, match=option):
        load_lora(LLaMA.from_pretrained(str(tmp_path / "base")), str(tmp_path / "lora"))


def test_adapters_that_do_not_fit(tmp_path):
    folder = tmp_path / "lora"
    save_lora(with_lora(tiny_llama(), targets=["wq", "w2"]), str(folder))
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, text = load_file(file), config.read_text()
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"

    def refused(*words):
        with pytest.raises(BadInput) as e:
            load_lora(tiny_llama(), str(folder))
        assert all(w in str(e.value) for w in words), f"{words} not in: {e.value}"

    for key, value in (("peft_type", "LOHA"), ("peft_type", None), ("r", None), ("lora_alpha", None), ("r", 4),
                       ("an_option_of_tomorrow", 1)):
        with edit(folder, "adapter_config.json") as c:
            c.update({key: value}) if value else c.pop(key)
        refused("adapter_config.json", key)
        config.write_text(text)
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    refused("layers.1.feed_forward.w2.lora_B")
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}, file)
    refused("lm_head")
    save_file({**tensors, name.replace("layers.1", "layers.2"): tensors[name].clone()}, file)
    refused("layers.2")
    save_file({**tensors, name: torch.ones(31, 3)}, file)
    refused("layers.1.feed_forward.w2.lora_B", "(31, 3)")
    for damaged in (file.read_bytes()[:-9], b""):
        file.write_bytes(damaged)
        refused("adapter_model.safetensors")
    file.unlink()
    refused("adapter_model.safetensors")
    config.unlink()
    refused("adapter_config.json")
    with pytest.raises(BadInput, match="no LoRA"):
        save_lora(tiny_llama(), str(folder))

# ---------------------------------------------------------------------------------------------------------------------
# A Hugging Face folder out of a merged model

def tokenizer(folder):
    """Put a tokenizer.model of 18 pieces into a folder."""
    SentencePieceTrainer.train(sentence_iterator=iter(["the weather will be fine in the north"] * 9),
                               model_prefix=str(folder / "tokenizer"), vocab_size=18, minloglevel=2)


def transformers_loads(folder, **how):
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def export(llama, folder, source, **how):
    """A LLaMA in memory as a Hugging Face folder."""
    dtype = llama.tok_embeddings.weight.dtype
    write_hf(str(folder), llama.args, llama.state_dict().items(), str(source), dtype, **how)


@pytest.mark.parametrize("kind, changes", [
    ("llama", {}), ("llama", dict(rope_parameters=LLAMA3)), ("mistral", dict(head_dim=16)),
    ("qwen2", dict(tie_word_embeddings=True)), ("qwen3", dict(head_dim=16))],
    ids=lambda x: x if isinstance(x, str) else comma(list(x)))
@pytest.mark.parametrize("form", ["new", "old"])
def test_export_from_hugging_face(tmp_path, kind, changes, form):
    hf_folder(tmp_path / "base", form, kind, **changes)
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    llama = merge_lora(with_lora(LLaMA.from_pretrained(str(tmp_path / "base"))))
    export(llama, tmp_path / "out", tmp_path / "base", shard_bytes=20_000)
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer_config.json"} <= files
    assert sum("-of-" in f for f in files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in llama.parameters())
    assert distance(transformers_loads(tmp_path / "out"), llama) < 1e-4
    assert difference(LLaMA.from_pretrained(str(tmp_path / "out")), llama) == 0
    assert not (tmp_path / "out.part").exists()


def test_export_from_meta(tmp_path):
    model = tiny_hf(rope_parameters=dict(rope_type="default", rope_theta=500.0), rms_norm_eps=1e-3)
    base, out = tmp_path / "base", str(tmp_path / "out")
    meta_folder(base, model, shards=2, rope_theta=500.0)
    tokenizer(base)
    plain = LLaMA.from_pretrained(str(base))
    export(plain, out, base)
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "tokenizer.model").exists()
    assert distance(transformers_loads(out), plain) < 1e-4 and distance(model, plain) < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    # weights that lie there in bfloat16 stay so, for transformers too, whatever type the source's config.json names
    merged = merge_lora(with_lora(LLaMA.from_pretrained(out, torch.bfloat16)))
    export(merged, tmp_path / "bf16", out)
    theirs = transformers_loads(tmp_path / "bf16", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.layers[1].mlp.down_proj.weight, merged.layers[1].feed_forward.w2.weight)


@pytest.mark.parametrize("shard_bytes", [1, 13_000])
def test_shards_are_filled_in_order_and_none_is_empty(tmp_path, shard_bytes):
    hf_folder(tmp_path / "base")
    llama = LLaMA.from_pretrained(str(tmp_path / "base"))
    export(llama, tmp_path / "out", tmp_path / "base", shard_bytes=shard_bytes)
    expected, room = [], 0
    for name, p in llama.named_parameters():
        if not expected or room + p.nbytes > shard_bytes:  # one that is larger than a shard has one of its own
            expected, room = [*expected, []], 0
        expected[-1].append(to_hf(name))
        room += p.nbytes
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(expected):05}.safetensors" for i in range(len(expected))]
    assert [sorted(load_file(tmp_path / "out" / f)) for f in files] == [sorted(names) for names in expected]
    assert difference(LLaMA.from_pretrained(str(tmp_path / "out")), llama) == 0


def test_export_refuses(tmp_path):
    hf_folder(tmp_path / "base")
    llama = LLaMA.from_pretrained(str(tmp_path / "base"))
    with pytest.raises(BadInput, match="there is no tokenizer to copy"):
        export(llama, tmp_path / "out", tmp_path / "absent")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises((BadInput, OSError)):
        export(llama, tmp_path / "out", tmp_path / "base")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["precious"]


def trained(base, run, dtype="float32", targets=("wq", "w3")):
    """A run whose best/ holds a LoRA on the tiny LLM in base, stored in dtype -> its model."""
    model = tiny_sllama(base)
    if dtype == "bfloat16":
        hf_folder(base, dtype=torch.bfloat16)
        model.llm = LLaMA.from_pretrained(str(base))
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    tokenizer(base)
    with_lora(model.llm, targets=list(targets))
    save_lora(model.llm, str(run / "best"))
    save_file({k: v.detach().clone() for k, v in model.vision_state().items()}, run / "best" / "vision.safetensors")
    config = vars(page(llm=str(base), ltn_dim=16, ltn_layers=1, ltn_heads=2, window=4))
    (run / "best" / "state.json").write_text(json.dumps({"config": config, "dim_in": 24, "extractor": {}, "step": 9}))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_program(tmp_path, monkeypatch, capsys, dtype):
    """The merged LLM is of the type in which the raw one is stored, and rounded to it once."""
    base, run = tmp_path / "base", tmp_path / "run"
    model = trained(base, run, dtype)
    monkeypatch.setattr("sys.argv", ["lora.py", "merge", f"ckpt={run}", f"to={tmp_path / 'merged'}"])
    main()
    assert str(run) in capsys.readouterr().out
    merged = transformers_loads(tmp_path / "merged", dtype="auto")
    files = {f.name for f in (tmp_path / "merged").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.model", "tokenizer.vocab", "generation_config.json",
                     "tokenizer_config.json"}
    stored = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {str(t.dtype) for t in stored} == {str(merged.dtype)} == {f"torch.{dtype}"}
    exact = dict(merge_lora(copy.deepcopy(model.llm)).named_parameters())
    for name, w in LLaMA.from_pretrained(str(tmp_path / "merged"), getattr(torch, dtype)).named_parameters():
        assert torch.equal(w, exact[name].to(w.dtype)), name
    if dtype == "float32":
        assert distance(merged, model.llm) < 1e-4
    with pytest.raises(BadInput, match="exists already"):
        main()
    (run / "best" / "adapter_model.safetensors").unlink(), (run / "best" / "adapter_config.json").unlink()
    state = json.loads((run / "best" / "state.json").read_text())
    state["config"] |= {"stage": "align", "freeze_llm": True}
    (run / "best" / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr("sys.argv", ["lora.py", "merge", f"ckpt={run}", f"to={tmp_path / 'other'}"])
    with pytest.raises(BadInput, match="nothing of its LLM has learnt, stage=align"):
        main()
    assert not (tmp_path / "other").exists()


def test_merge_program_loses_nothing_without_a_word(tmp_path, monkeypatch):
    """Every update must find its weight in the LLM, both its halves must be there, and the LLM must be whole."""
    base, run = tmp_path / "base", tmp_path / "run"
    trained(base, run)
    adapter = run / "best" / "adapter_model.safetensors"
    tensors, weights = load_file(adapter), load_file(base / "model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def refused(llm, *words):
        monkeypatch.setattr("sys.argv", ["lora.py", "merge", f"ckpt={run}", f"llm={llm}", f"to={tmp_path / 'merged'}"])
        with pytest.raises(BadInput) as e:
            main()
        assert all(w in str(e.value) for w in words), f"{words} not in: {e.value}"
        assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.part").exists()

    hf_folder(tmp_path / "other", num_hidden_layers=1)
    refused(tmp_path / "other", str(run / "best"), "surplus tensor layers.1.attention.wq.lora_A")
    hf_folder(tmp_path / "wide", intermediate_size=64)
    refused(tmp_path / "wide", "layers.0.feed_forward.w3.lora_B", "(48, 3)", "(64, 3)")
    save_file({k: v for k, v in tensors.items() if k != name}, adapter)
    refused(base, "has no tensor layers.1.feed_forward.w3.lora_B")
    save_file(tensors, adapter)
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, base / "model.safetensors")
    refused(base, str(base), "has no tensor norm.weight")
