"""Late SAM for a small causal language model with tied embeddings, on every backend.

    python examples/gpt.py                                              # one process
    torchrun --nproc_per_node 2 examples/gpt.py --backend ddp           # DistributedDataParallel
    torchrun --nproc_per_node 2 examples/gpt.py --backend fsdp2         # torch's fully_shard
    deepspeed --num_gpus 2 examples/gpt.py --backend zero2              # or zero1, zero3
    torchrun --nproc_per_node 2 examples/gpt.py --backend fsdp2 --model llama    # or gpt2

It predicts the next byte of a file (--text). `--model gpt` is the model below; gpt2 and llama are
those of transformers, made from a config: nothing is downloaded. The first steps are plain AdamW;
the last ones, from --look_from on, are LookSAM: every k-th of them computes a second gradient, the
others reuse its new part. `--out DIR` saves a checkpoint there, and continues from the newest one
that it finds, on any backend and number of ranks. All backends give the same weights, up to
rounding.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_looksam import Engine, LookSAM, restore
from dist_looksam.checkpoint import save
from dist_looksam.cli.leave import leave

BYTES, WIDTH, HEADS, LENGTH = 256, 64, 4, 32
BATCH, ACCUMULATION = 24, 2  # sequences of a step, over all ranks; micro-batches of each rank


class Block(nn.Module):
    """Attention to earlier bytes only, then an MLP; [B, T, WIDTH] -> [B, T, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [B, HEADS, T, WIDTH / HEADS]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes [B, T] to logits [B, T, BYTES]. The head's matrix is the embedding's: one layer."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def of_transformers(name: str, dropout: float) -> nn.Module:
    """A small GPT-2 or Llama whose head's matrix is the embedding's."""
    import transformers

    common = {"vocab_size": BYTES, "bos_token_id": None, "eos_token_id": None}
    common |= {"tie_word_embeddings": True, "use_cache": False}
    if name == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": LENGTH + 1}
        rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
        config = transformers.GPT2Config(**common, **sizes, **rates)
    else:
        sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
        config = transformers.LlamaConfig(**common, **sizes, **heads, attention_dropout=dropout)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.train()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of the model's blocks, each a unit of FSDP2."""
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList))


def loss(model: nn.Module, text: Tensor) -> Tensor:
    """Mean cross-entropy of each next byte, in nats. text: [B, LENGTH + 1]."""
    logits = model(text[:, :-1])
    logits = getattr(logits, "logits", logits)  # transformers' models return several things
    return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def sequences(text: Tensor, step: int) -> Tensor:
    """The global batch of a step, [BATCH, LENGTH + 1]. It does not depend on the ranks."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=draw)
    return torch.stack([text[s : s + LENGTH + 1] for s in starts]).long()


def optimizer_of(model: nn.Module, asked: argparse.Namespace) -> LookSAM:
    """LookSAM around AdamW; matrices have weight decay. Call it after fully_shard."""
    params = list(model.parameters())  # the tied matrix is in it once
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    base = torch.optim.AdamW(groups, lr=asked.lr, eps=asked.eps)
    return LookSAM(
        params, base, rho=0.05, k=3, alpha=0.5, reuse="natural", look_from=asked.look_from
    )


def engine_of(backend: str, asked: argparse.Namespace, device: torch.device) -> Engine:
    torch.manual_seed(0)  # the same weights on every rank
    own = asked.model == "gpt"
    model = (GPT() if own else of_transformers(asked.model, asked.dropout)).to(device)
    if backend.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": BATCH // (dist.get_world_size() * ACCUMULATION),
            "gradient_accumulation_steps": ACCUMULATION,
            "zero_optimization": {"stage": int(backend[-1])},
            "gradient_clipping": 0.0,  # Engine(clip=...) clips, once
            "zero_allow_untested_optimizer": True,
            "timers": {"throughput": {"enabled": False}},  # else the host waits for the device
        }
        ds_engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer_of(model, asked), config=config
        )
        return Engine(ds_engine, loss=loss, clip=1.0)
    if backend == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif backend == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)  # embedding and head, which share a matrix, are in one unit
    return Engine(model, optimizer_of(model, asked), loss=loss, clip=1.0)


def start(backend: str) -> torch.device:
    """Joins the ranks of the launcher; returns this rank's device."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if backend != "plain":
        dist.init_process_group()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")
    parser.add_argument("--backend", choices=names, default="plain")
    parser.add_argument("--model", choices=("gpt", "gpt2", "llama"), default="gpt")
    parser.add_argument("--dropout", type=float, default=0.0, help="of gpt2 and llama")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="file to learn")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--look_from", type=int, default=80, help="first step of LookSAM")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--eps", type=float, default=1e-8, help="of AdamW")
    parser.add_argument("--out", type=Path, help="folder of checkpoints")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed adds it
    asked = parser.parse_args()

    device = start(asked.backend)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(1 + rank)  # each rank drops other activations
    text = torch.frombuffer(bytearray(asked.text.read_bytes()), dtype=torch.uint8)
    engine = engine_of(asked.backend, asked, device)
    if asked.out and asked.out.is_dir():
        restore(engine, asked.out)
    while engine.optimizer.steps < asked.steps:
        parts = sequences(text, engine.optimizer.steps).to(device).chunk(ranks * ACCUMULATION)
        report = engine.step(parts[rank::ranks])  # a list; a look uses it twice
        if rank == 0 and (report.look or report.step % 10 == 0):
            print(f"step {report.step}: loss {report.loss:.4f}{', a look' * report.look}")
    if asked.out:
        save(engine, asked.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)  # sys.exit(0), also where threads of gloo still run
