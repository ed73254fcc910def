"""Hugging Face's transformers beside what `lockstep import` and `lockstep export` read and write.

    python hf_models.py make DIR               models of random parameters, with tokenizers and chat templates
    python hf_models.py ask FOLDER             what a model says to questions in JSON on standard input
    python hf_models.py same FOLDER FOLDER     whether two folders hold the same model
    python hf_models.py gguf FILE FOLDER       whether a GGUF file holds a folder's model

`ask` prints JSON; `same` and `gguf` exit with 1 and say what differs. Everything is computed in f32.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

TEXT = "The cat sat on the mat, and it's 1234 o'clock.\n\n  Größe: 学而时习之!  <|im_end|> </s>"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}
    {{ '<|im_start|>assistant\\n' }}
{% endif %}"""
HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'].strip() %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
<<{{ system | trim | upper }}>>
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content.split('</think>')[-1].lstrip() }}{% endgeneration %}
    {%- else %}{{- '[' ~ message['role'] ~ '] ' + message['content'] | trim + eos_token }}
    {%- endif %}
    {{ message | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""


def byte_level(split: str | None, specials: list[str]) -> Tokenizer:
    """A byte-level BPE of 400 tokens, cut by GPT-2's expression or another."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split is not None))
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, Path(__file__).read_text()] * 3, trainer)
    return tokenizer


def save(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, shard: str) -> None:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)


def make(root: Path) -> None:
    """gpt2 in f32 and gpt2-bf16 in bf16, both in several files; llama3 with all that Llama 3 has."""
    end = "<|endoftext|>"
    sizes = {"n_embd": 96, "n_layer": 6, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=byte_level(None, [end]), bos_token=end, eos_token=end)
    # Rows beyond the tokenizer's, as models padded for speed have them.
    config = GPT2Config(vocab_size=403, bos_token_id=0, eos_token_id=0, **sizes)
    save(root / "gpt2", config, gpt2, torch.float32, "400KB")
    save(root / "gpt2-bf16", config, gpt2, torch.bfloat16, "400KB")

    specials = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(LLAMA_3, specials),
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    tokenizer.chat_template = CHATML
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=[3, 1],
        pad_token_id=4,
    )
    save(root / "llama3", config, tokenizer, torch.float32, "10GB")


class Warnings(logging.Handler):
    """What transformers warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def load(folder: Path, **more: Any) -> Any:
    """A folder's model in f32; exits where transformers found other tensors than it expects, or warns."""
    warnings = Warnings()
    logger = logging.getLogger("transformers")
    logger.addHandler(warnings)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    logger.removeHandler(warnings)
    for kind, names in info.items():
        if names:
            sys.exit(f"{folder}: {kind}: {names}")
    if warnings.said:
        sys.exit(f"{folder}: transformers warns: {warnings.said}")
    return model.eval()


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The prompt and what follows, also beyond an end of text."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )
    return out[0].tolist()


def ask(folder: Path) -> None:
    question = json.load(sys.stdin)
    answer: dict[str, Any] = {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if texts := question.get("texts"):
        # Of texts in which names of special tokens are text; as tokenizer.json says, since transformers makes some classes
        # of tokenizer anew, and then leaves out what has no token: LlamaTokenizer, for one, has no unk_token.
        library = Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.encode_special_tokens = True
        answer["ids"] = [library.encode(text).ids for text in texts]
        if answer["ids"][0] != tokenizer(texts[0])["input_ids"]:
            sys.exit(f"{folder}: transformers and tokenizers differ about {texts[0]!r}")
        answer["texts"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answer["ids"]]
    if "prompt" in question:
        model = load(folder)
        ids = question["prompt"]
        with torch.no_grad():
            answer["logits"] = model(torch.tensor([ids])).logits[0, -1].tolist()
        answer["greedy"] = greedy(model, ids, question["tokens"])
    if "chats" in question:
        answer["templates"] = []
        for template in (CHATML, HEADERS):
            rendered = [
                tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=add
                )
                for chat in question["chats"]
                for add in (False, True)
            ]
            answer["templates"].append({"template": template, "rendered": rendered})
        answer["chat_ids"] = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in question["chats"]
        ]
    json.dump(answer, sys.stdout)


def same(first: Path, second: Path) -> None:
    models = [load(folder) for folder in (first, second)]
    states = [model.state_dict() for model in models]
    if states[0].keys() != states[1].keys():
        sys.exit(f"tensors: {states[0].keys() ^ states[1].keys()}")
    for name, tensor in states[0].items():
        if not torch.equal(tensor, states[1][name]):
            sys.exit(f"{name} differs")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (first, second)]
    ids = [tokenizer(TEXT)["input_ids"] for tokenizer in tokenizers]
    if ids[0] != ids[1]:
        sys.exit(f"ids: {ids}")
    prompt = ids[0][:20]
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits for model in models]
    if not torch.equal(*logits):
        sys.exit(f"logits differ by {(logits[0] - logits[1]).abs().max()}")
    said = [model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False).tolist() for model in models]
    if said[0] != said[1]:
        sys.exit(f"generate: {said}")
    for key in ("chat_template", "eos_token", "bos_token", "pad_token"):
        values = [getattr(tokenizer, key) for tokenizer in tokenizers]
        if values[0] != values[1]:
            sys.exit(f"{key}: {values}")
    ends = [model.generation_config.eos_token_id for model in models]
    if ends[0] != ends[1]:
        sys.exit(f"generation_config.eos_token_id: {ends}")


def gguf(file: Path, folder: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    config, kind = model.config, fields["general.architecture"]
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    expected: dict[str, Any] = {
        "general.architecture": {"gpt2": "gpt2", "llama": "llama"}[config.model_type],
        f"{kind}.block_count": layers,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.attention.head_count": heads,
        f"{kind}.vocab_size": config.vocab_size,
    }
    if kind == "llama":
        expected |= {
            "llama.attention.head_count_kv": config.num_key_value_heads,
            "llama.feed_forward_length": config.intermediate_size,
            "llama.rope.dimension_count": config.head_dim,
            "llama.rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
            "llama.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        }
    if tokenizer.chat_template:
        expected["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.eos_token_id is not None:
        expected["tokenizer.ggml.eos_token_id"] = tokenizer.eos_token_id
    for key, value in expected.items():
        if fields.get(key) != value:
            sys.exit(f"{key} is {fields.get(key)!r} and not {value!r}")
    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = tokenizer.get_vocab()
    if len(tokens) != config.vocab_size or len(fields["tokenizer.ggml.token_type"]) != config.vocab_size:
        sys.exit(f"{len(tokens)} tokens")
    for name, number in vocabulary.items():
        if tokens[number] != name:
            sys.exit(f"token {number} is {tokens[number]!r} and not {name!r}")

    # Sizes and values, by the names and the order of rows that llama.cpp's own converter gives them.
    state = {name.removeprefix("model.").removeprefix("transformer."): t for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    names = {
        "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "embed_tokens": "token_embd",
        "norm": "output_norm", "lm_head": "output", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in state.items():
        module, part = name.rsplit(".", 1)
        pieces = module.split(".")
        if pieces[0] in ("h", "layers"):
            place = f"blk.{pieces[1]}.{names['.'.join(pieces[2:])]}.{part}"
        else:
            place = f"{names[module]}.{part}"
        values = tensor.numpy()
        if kind == "gpt2" and values.ndim == 2 and pieces[0] == "h":
            values = values.T
        if "attn_q." in place or "attn_k." in place:
            count = heads if "attn_q." in place else config.num_key_value_heads
            rows, columns = values.shape
            values = values.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        found = theirs.pop(place)
        if list(reversed(found.shape.tolist())) != list(values.shape):
            sys.exit(f"{place} has sizes {found.shape} and not {values.shape}")
        if found.tensor_type == GGMLQuantizationType.BF16:
            data = (found.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            values = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().float().numpy()
        elif found.tensor_type == GGMLQuantizationType.F16:
            data, values = found.data.astype(np.float32), values.astype(np.float16).astype(np.float32)
        else:
            data = found.data
        if values.ndim == 1 and found.tensor_type != GGMLQuantizationType.F32:
            sys.exit(f"{place} is {found.tensor_type}")
        if not np.array_equal(data.reshape(values.shape), values):
            sys.exit(f"{place} differs")
    if kind == "llama" and config.rope_parameters["rope_type"] == "llama3":
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = plain / model.model.rotary_emb.inv_freq.numpy()
        if not np.allclose(theirs.pop("rope_freqs.weight").data, factors, rtol=1e-5):
            sys.exit("rope_freqs.weight differs")
    if theirs:
        sys.exit(f"more tensors: {list(theirs)}")

    prompt = torch.tensor([list(range(5, 25))])
    with torch.no_grad():
        difference = (model(prompt).logits[0] - forward(fields, reader.tensors, prompt[0])).abs().max().item()
    exact = fields["general.file_type"] == 0
    if difference > (1e-3 if exact else 0.1 * model(prompt).logits.abs().max().item()):
        sys.exit(f"logits differ by {difference}")


def forward(fields: dict[str, Any], tensors: list[Any], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] as llama.cpp computes them: matrices [out, in], and a Llama's heads turned in neighbouring pairs."""
    from gguf import dequantize

    w = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float() for t in tensors}
    kind = fields["general.architecture"]
    heads, length = fields[f"{kind}.attention.head_count"], len(tokens)
    mask = torch.full((length, length), float("-inf")).triu(1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(heads // x.shape[0], 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask
        return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(length, count, -1).transpose(0, 1)

    x = w["token_embd.weight"][tokens]
    if kind == "gpt2":
        epsilon = fields["gpt2.attention.layer_norm_epsilon"]

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
            return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

        x = x + w["position_embd.weight"][:length]
    else:
        epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
        width = fields["llama.rope.dimension_count"]
        frequencies = fields["llama.rope.freq_base"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(length)[:, None] * frequencies / w.get("rope_freqs.weight", torch.ones(width // 2))
        turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * w[f"{name}.weight"]

        def rotate(x: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
            return torch.view_as_real(pairs * turns).flatten(-2)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    for layer in range(fields[f"{kind}.block_count"]):
        block = f"blk.{layer}"
        h = norm(x, f"{block}.attn_norm")
        if kind == "gpt2":
            q, k, v = (split(part, heads) for part in linear(h, f"{block}.attn_qkv").chunk(3, -1))
        else:
            kv_heads = fields["llama.attention.head_count_kv"]
            q, k, v = (
                split(linear(h, f"{block}.attn_{part}"), count)
                for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q, k = rotate(q), rotate(k)
        x = x + linear(attend(q, k, v), f"{block}.attn_output")
        h = norm(x, f"{block}.ffn_norm")
        if kind == "gpt2":
            hidden = torch.nn.functional.gelu(linear(h, f"{block}.ffn_up"), approximate="tanh")
        else:
            hidden = torch.nn.functional.silu(linear(h, f"{block}.ffn_gate")) * linear(h, f"{block}.ffn_up")
        x = x + linear(hidden, f"{block}.ffn_down")
    return norm(x, "output_norm") @ w.get("output.weight", w["token_embd.weight"]).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["make", "ask", "same", "gguf"])
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    {"make": make, "ask": ask, "same": same, "gguf": gguf}[arguments.task](*arguments.paths)


if __name__ == "__main__":
    main()
