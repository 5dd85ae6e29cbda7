"""Train a small Mixture-of-Experts model with its experts spread over torchrun's ranks.

    torchrun --nproc-per-node 4 examples/train_moe.py --steps 40

Attention is data-parallel: each rank has its own batch, and dense gradients are averaged with torch.distributed.
Experts are not: each lives on one rank, sees the tokens of all, and its gradient is complete as it is. The text is
the Python reference that ships with the interpreter (pydoc_data.topics), in bytes.
"""

import argparse
import os
import pydoc_data.topics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elastic_moe import ElasticRuntime, Launch, elasticize
from elastic_moe.layer import ElasticMoELayer


def build_model() -> Qwen3MoeForCausalLM:
    """A 1.6M-parameter byte-level model, the same on every rank."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def batches(rank: int, batch: int, length: int):  # noqa: ANN201 - a generator of tensors
    """Random windows of the text, other ones on every rank."""
    text = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1000 + rank)
    while True:
        starts = torch.randint(len(text) - length, (batch,), generator=generator)
        yield torch.stack([text[s : s + length] for s in starts.tolist()]).long()


def average_gradients(model: torch.nn.Module, world_size: int) -> None:
    """The mean over ranks: dense gradients are reduced, those of experts already hold every rank's tokens."""
    experts = {id(p) for m in model.modules() if isinstance(m, ElasticMoELayer) for p in m.parameters()}
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if id(parameter) not in experts:
            dist.all_reduce(parameter.grad)
        parameter.grad /= world_size


def main() -> None:
    """Train, and print the mean loss of all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank and step")
    parser.add_argument("--length", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    launch = Launch.from_torchrun(os.environ)
    if launch.world_size > 1:
        dist.init_process_group("gloo")
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"))
    model = elasticize(build_model(), runtime)
    if launch.rank == 0:
        share = sum(p.numel() for p in model.parameters())
        print(f"{launch.world_size} ranks, {share / 1e6:.2f}M parameters on each", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step, tokens in zip(range(args.steps), batches(launch.rank, args.batch, args.length), strict=False):
        with runtime.step():
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        if launch.world_size > 1:
            average_gradients(model, launch.world_size)
            dist.all_reduce(mean := loss.detach().clone())
        else:
            mean = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if launch.rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step:4d}  loss {mean.item() / launch.world_size:.3f}", flush=True)
    runtime.groups.control.barrier()
    if launch.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
