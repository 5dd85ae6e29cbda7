"""Make the demo model: a 7M-parameter Qwen3-MoE language model trained on three Debian documentation packages.

    python examples/train_demo_model.py --prepare  # packages -> clean text -> tokenizer and token files
    python examples/train_demo_model.py --train    # token files -> bf16 checkpoint (one GPU, or --device cpu)

`--prepare` needs an amd64 Debian 12 machine with network (`apt-get download`; nothing is installed); `--train` neither.
"""

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

EOS = "<|endoftext|>"
EOS_ID = 0
SIZES = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5}
ATTENTION = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LAYERS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": True, "router_aux_loss_coef": 0.01}
PACKAGES = ("python3.11-doc", "bible-kjv-text", "bible-kjv", "debian-handbook")  # bible-kjv: reads bible-kjv-text
REPEATS = {"python": 1, "bible": 1, "debian": 2}  # how often a training document occurs in train.bin
WARMUP = 200  # steps
HOLDOUT = slice(10, None, 50)  # of each domain's documents in order: 2%, kept for validation
SKIPPED_PAGES = re.compile(r"/(contents|genindex.*|py-modindex|search|download|index|changelog)\.html$")
VOID_TAGS = frozenset({"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr", "path"})
BLOCK_TAGS = frozenset(re.findall(r"\w+", "p div li dt dd h1 h2 h3 h4 h5 h6 pre tr ul ol dl section table aside body"))
SKIPPED_TAGS = frozenset({"script", "style", "nav", "svg", "form", "footer"})
SKIPPED_CLASSES = frozenset(
    {"docnav", "indexterm", "headerlink", "toctree-wrapper", "toc", "copybutton", "legalnotice"}
)
ASCII_FORMS = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}
    | {"\u00a0": " ", "\u00b6": "", "\u2192": "->", "\u2011": "-", "\u2212": "-", "\u2022": "-", "\u200b": ""}
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- set content = message['content'] -%}"
    "{%- if content is string -%}{{ content }}{%- elif content is iterable -%}"
    "{%- for part in content -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}{%- endfor -%}"
)


class PageText(HTMLParser):
    """Text blocks of one documentation page (Sphinx or Publican), without menus, indexes and link marks."""

    def __init__(self, root: tuple[str, str, str]) -> None:
        """Collect below the first element whose (tag, attribute, value) is `root`; an empty attribute matches any."""
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._root = root
        self._stack: list[str] = []
        self._root_depth = self._skip_depth = 0
        self._text, self._prefix = [], ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element: enter the root, a skipped part or a new block."""
        if tag in VOID_TAGS:
            self._text.append("\n" if tag == "br" and "pre" in self._stack else " ")
            return
        self._stack.append(tag)
        values = {name: value or "" for name, value in attrs}
        root_tag, root_attribute, root_value = self._root
        if not self._root_depth and tag == root_tag and values.get(root_attribute, "") == root_value:
            self._root_depth = len(self._stack)
        unwanted = tag in SKIPPED_TAGS or values.get("id") in ("banner", "title")
        if not self._skip_depth and (unwanted or SKIPPED_CLASSES & set(values.get("class", "").split())):
            self._skip_depth = len(self._stack)
        if tag in BLOCK_TAGS and "tr" not in self._stack[:-1]:
            self._flush()
            self._prefix = "- " if tag == "li" else "# " if re.fullmatch("h[1-6]", tag) else self._prefix

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element of this name and whatever was left open inside it."""
        if tag in VOID_TAGS or tag not in self._stack:
            return
        if tag in ("td", "th"):
            self._text.append(" | ")
        if tag in BLOCK_TAGS and "tr" not in self._stack[:-1]:
            self._flush()
        while self._stack.pop() != tag:
            pass
        if len(self._stack) < self._skip_depth:
            self._skip_depth = 0
        if len(self._stack) < self._root_depth:
            self._root_depth = 0

    def handle_data(self, data: str) -> None:
        """Keep the text inside the root and outside skipped parts."""
        if self._root_depth and not self._skip_depth:
            self._text.append(data)

    def _flush(self) -> None:
        text, self._text = "".join(self._text).translate(ASCII_FORMS), []
        if "pre" in self._stack:
            text = "\n".join(line.rstrip() for line in text.expandtabs(4).split("\n")).strip("\n")
        else:
            text = " ".join(text.split()).removesuffix(" |")
        if self._prefix == "# ":
            text = re.sub(r"^(Chapter )?(\d+|[A-F])(\.\d+)*\. ", "", text)
        if text.strip():
            self.blocks.append(self._prefix + text)
            self._prefix = ""


def fetch_packages(work: Path) -> None:
    """Download and unpack the Debian packages into `work`, those not yet there."""
    for package in PACKAGES:
        if not (work / package).exists():
            work.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=work, check=True)
            subprocess.run(["dpkg", "-x", next(work.glob(f"{package}_*.deb")), work / package], check=True)


def html_documents(folder: Path, root: tuple[str, str, str]) -> Iterator[list[str]]:
    """Text blocks of each HTML page under `folder`, in the order of their paths."""
    for page in sorted(folder.rglob("*.html")):
        if not page.is_symlink() and not SKIPPED_PAGES.search(str(page)):
            parser = PageText(root)
            parser.feed(page.read_text(encoding="utf-8"))
            yield parser.blocks


def bible_documents(work: Path) -> Iterator[list[str]]:
    """Heading and text of each chapter, one verse a line, without verse numbers."""
    reader, texts = work / "bible-kjv/usr/bin/bible", work / "bible-kjv-text/usr/lib"
    command = [reader.resolve(), "-l9999", "-p", f"{texts.resolve()}/", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name, verses = "", []
    for line in [*printed.splitlines(), "end 0"]:
        if verse := re.match(r"\s+\d+ (.*\S)", line):
            verses.append(verse[1])
        elif line.strip():
            if verses:
                yield [f"# {name}", "\n".join(verses)]
            name, verses = line.strip(), []


def clean(documents: Iterator[list[str]]) -> list[str]:
    """Texts of the documents without blocks seen before and blocks that are not ASCII, if enough is left of them."""
    seen: set[str] = set()
    texts = []
    for document in documents:
        blocks = []
        for block in document:
            if (len(block) < 60 or block not in seen) and sum(c > "~" for c in block) <= 0.1 * len(block):
                seen.add(block)
                blocks.append(block)
        if sum(map(len, blocks)) >= 200:
            texts.append("\n\n".join(blocks) + "\n")
    return texts


def make_tokenizer(texts: list[str], data: Path) -> Tokenizer:
    """Byte-level BPE over `texts`, id 0 the end of text; written to `data`, with a chat template for a base model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": [EOS], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=SIZES["vocab_size"], **options))
    tokenizer.save(str(data / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    settings |= {"model_max_length": ATTENTION["max_position_embeddings"], "clean_up_tokenization_spaces": False}
    settings["chat_template"] = CHAT_TEMPLATE
    (data / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def prepare(work: Path, data: Path, seed: int) -> None:
    """Write the tokenizer, train.bin, val.bin (uint16 token ids) and meta.json (sizes, val ranges) into `data`."""
    fetch_packages(work)
    data.mkdir(parents=True, exist_ok=True)
    python_pages = work / "python3.11-doc/usr/share/doc/python3.11/html"
    handbook = work / "debian-handbook/usr/share/doc/debian-handbook/html/en-US"
    domains = {"python": clean(html_documents(python_pages, ("div", "role", "main")))}
    domains["bible"] = clean(bible_documents(work))
    domains["debian"] = clean(html_documents(handbook, ("body", "", "")))
    val = {domain: texts[HOLDOUT] for domain, texts in domains.items()}
    for texts in domains.values():
        del texts[HOLDOUT]
    tokenizer = make_tokenizer([text for texts in domains.values() for text in texts], data)
    train_ids, val_ids, meta, val_end = [], [], {}, 0
    for domain, texts in domains.items():
        train, held_out = (
            [np.array([*tokenizer.encode(text).ids, EOS_ID], dtype=np.uint16) for text in part]
            for part in (texts, val[domain])
        )
        val_start, val_end = val_end, val_end + sum(map(len, held_out))
        train_bytes, val_bytes = (sum(len(text.encode()) for text in part) for part in (texts, val[domain]))
        meta[domain] = {"train_documents": len(train), "train_bytes": train_bytes, "val_documents": len(held_out)}
        meta[domain] |= {"train_tokens": sum(map(len, train)), "repeats": REPEATS[domain]}
        meta[domain] |= {"val_bytes": val_bytes, "val_start": val_start, "val_end": val_end}
        train_ids += [ids for ids in train for _ in range(REPEATS[domain])]
        val_ids += held_out
    random.Random(seed).shuffle(train_ids)
    np.concatenate(train_ids).tofile(data / "train.bin")
    np.concatenate(val_ids).tofile(data / "val.bin")
    (data / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def add_dropout(model: Qwen3MoeForCausalLM, p: float) -> None:
    """Drop embeddings and what attention and experts add to the residual stream (Qwen3-MoE itself has none of it)."""

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, p, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's load balancing loss (arXiv 2101.03961) of each layer, not of all pooled; 1 when balanced."""
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, -1).indices, 1.0 / top_k)
        losses.append(probs.shape[1] * (probs.mean(0) * chosen.mean(0)).sum())
    return torch.stack(losses).mean()


def token_loss(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropy in nats a token, balance loss) of token ids (rows, length + 1)."""
    output = model.model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state).float()
    entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return entropy, balance_loss(output.router_logits, model.config.num_experts_per_tok)


class MasterAdamW:
    """AdamW on float32 copies of a model's parameters, which may be bfloat16; clips gradients to norm 1."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, lr: float) -> None:
        """Take the copies, then turn the parameters (not the buffers: rotary angles stay float32) into `dtype`."""
        self._params = list(model.parameters())
        self._masters = [p.detach().clone().requires_grad_() for p in self._params]
        for param in self._params:
            param.data = param.data.to(dtype)
        matrices, vectors = ([p for p in self._masters if (p.ndim > 1) is wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self._lr = lr
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def step(self, lr_factor: float) -> None:
        """Apply the model's gradients at `lr_factor` times the learning rate, and clear them."""
        for master, param in zip(self._masters, self._params, strict=True):
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * lr_factor
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._params, self._masters)


@torch.inference_mode()
def validate(model: Qwen3MoeForCausalLM, data: Path, length: int) -> dict[str, dict[str, float]]:
    """Held-out loss by domain: windows of `length` tokens that do not overlap, no context carried between them."""
    model.eval()
    meta = json.loads((data / "meta.json").read_text())
    val = torch.from_numpy(np.fromfile(data / "val.bin", dtype=np.uint16).astype(np.int64)).to(model.device)
    rows, totals = {}, np.zeros(3)
    for domain, sizes in meta.items():
        ids = torch.cat([val.new_tensor([EOS_ID]), val[sizes["val_start"] : sizes["val_end"]]])
        whole = (len(ids) - 1) // length * length
        batches = [*ids[: whole + 1].unfold(0, length + 1, length).split(16), ids[None, whole:]]
        nats = sum(token_loss(model, b)[0].item() * b[:, 1:].numel() for b in batches if b.shape[1] > 1)
        rows[domain] = np.array([nats, len(ids) - 1, sizes["val_bytes"]])
        totals += rows[domain]
    losses = {}
    for domain, (nats, tokens, num_bytes) in (rows | {"all": totals}).items():
        losses[domain] = {"loss": round(nats / tokens, 4), "perplexity": round(math.exp(nats / tokens), 3)}
        losses[domain] |= {"bits_per_byte": round(nats / math.log(2) / num_bytes, 4)}
    model.train()
    return losses


def sample_windows(train: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """`rows` windows of `length` + 1 tokens at random places, (rows, length + 1)."""
    starts = torch.randint(len(train) - length - 1, (rows, 1), device=train.device)
    return train[starts + torch.arange(length + 1, device=train.device)]


def train(args: argparse.Namespace) -> None:
    """Train from the token files and write checkpoint, tokenizer and train.json into `args.out`."""
    started = time.monotonic()
    torch.manual_seed(args.seed)
    on_gpu = args.device.startswith("cuda")
    tokens = torch.from_numpy(np.fromfile(args.data / "train.bin", dtype=np.uint16).astype(np.int64)).to(args.device)
    experts = "grouped_mm" if on_gpu else "eager"
    config = Qwen3MoeConfig(**SIZES, **ATTENTION, **EXPERTS, **LAYERS, **ROPE, eos_token_id=EOS_ID)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts).to(args.device).train()
    add_dropout(model, args.dropout)
    optimizer = MasterAdamW(model, torch.bfloat16 if on_gpu else torch.float32, args.lr)
    positions, log = 0, []
    for step in range(args.steps):
        length = args.length * (2 if step % 4 == 0 else 1)  # a quarter of the steps trains the far positions
        batch = sample_windows(tokens, max(1, args.batch_tokens // length), length)
        entropy, balance = token_loss(model, batch)
        (entropy + model.config.router_aux_loss_coef * balance).backward()
        cosine = math.cos(math.pi * max(0, step - WARMUP) / max(1, args.steps - WARMUP))
        optimizer.step(min(1.0, (step + 1) / WARMUP) * (0.505 + 0.495 * cosine))
        positions += batch[:, 1:].numel()
        done = step + 1
        if done == args.steps or done % max(100, args.steps // 10) == 0:
            val = validate(model, args.data, args.length)
            row = {"step": done, "positions": positions, "seconds": round(time.monotonic() - started, 1)}
            row |= {"train": round(entropy.item(), 4), "balance": round(balance.item(), 4)}
            log.append(row | {domain: part["loss"] for domain, part in val.items()})
            print(json.dumps(log[-1]), flush=True)
    save(model.float(), args.data, args.out)
    summary = {"settings": vars(args), "log": log, "val": val}
    (args.out / "train.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")


def save(model: Qwen3MoeForCausalLM, data: Path, out: Path) -> None:
    """Write the bfloat16 checkpoint and the tokenizer into `out`; refuse weights that are not finite."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("a weight is not finite: train with a lower --lr")
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    model.to(torch.bfloat16).save_pretrained(out)
    config = out / "config.json"  # transformers 5 renames this key; every version reads the older name
    config.write_text(config.read_text().replace('"num_local_experts"', '"num_experts"'))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data / name, out / name)


def main() -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(".demo_data/packages"), help="unpacked Debian packages")
    parser.add_argument("--data", type=Path, default=Path(".demo_data"), help="tokenizer and token files")
    parser.add_argument("--out", type=Path, default=Path(".demo_data/model"), help="checkpoint folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2135)
    parser.add_argument("--batch-tokens", type=int, default=32768 if torch.cuda.is_available() else 2048, help="a step")
    parser.add_argument("--length", type=int, default=512, help="window length; every fourth step has twice that")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.prepare or args.train):
        parser.error("ask for --prepare, --train or both")
    if args.prepare:
        prepare(args.work, args.data, args.seed)
    if args.train:
        train(args)


if __name__ == "__main__":
    main()
