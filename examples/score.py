"""Score documents with a Mixture-of-Experts model spread over torchrun's ranks; any rank may die, none is missed.

    torchrun --standalone --nproc-per-node 4 -m elastic_moe.supervise examples/score.py --out scores
    torchrun --standalone --nproc-per-node 4 -m elastic_moe.supervise examples/score.py --out scores2 --kill 2

Each rank scores its share of the documents and appends every result to a file of its own, so that a rank that died
goes on after the last one it wrote. `runtime.run` repeats the forward in which a peer was lost: no score changes.
With `--kill R` rank R kills itself in the middle; compare the two outputs.
"""

import argparse
import json
import os
import pydoc_data.topics
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elastic_moe import ElasticRuntime, Launch, elasticize
from elastic_moe.integrations.transformers import meta_model

MODEL = Path(__file__).resolve().parent / "demo_model"
MAX_TOKENS = 256


def main() -> None:
    """Score this rank's share, wait for the others, and let rank 0 print the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the scores")
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--kill", type=int, default=-1, metavar="R", help="rank R kills itself once, half way")
    args = parser.parse_args()
    torch.set_num_threads(1)
    launch = Launch.from_torchrun(os.environ)
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"))
    runtime.on_rank_lost.append(lambda rank: print(f"rank {launch.rank}: lost rank {rank}", flush=True))
    runtime.on_rank_joined.append(lambda rank: print(f"rank {launch.rank}: rank {rank} joined", flush=True))
    model = elasticize(meta_model(MODEL, torch.float32), runtime, checkpoint=MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    documents = list(pydoc_data.topics.topics.values())[: args.documents]
    mine = range(launch.rank, len(documents), launch.world_size)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"rank{launch.rank}.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as out, torch.inference_mode():
        for number in mine[done:]:
            tokens = torch.tensor([tokenizer.encode(documents[number], truncation=True, max_length=MAX_TOKENS)])
            if launch.rank == args.kill and done == 0 and number == mine[len(mine) // 2]:
                os.kill(os.getpid(), signal.SIGKILL)
            loss = runtime.run(lambda: model(input_ids=tokens, labels=tokens).loss)  # noqa: B023 - runs at once
            out.write(json.dumps({"document": number, "loss": round(loss.item(), 5)}) + "\n")
            out.flush()
    runtime.finish()
    if launch.rank == 0:
        scores = [json.loads(line) for file in args.out.glob("rank*.jsonl") for line in file.read_text().splitlines()]
        losses = {score["document"]: score["loss"] for score in scores}
        print(f"{len(losses)} documents, mean loss {sum(losses.values()) / len(losses):.4f}", flush=True)


if __name__ == "__main__":
    main()
