"""LookSAM under Hugging Face's Trainer: a small causal language model with tied embeddings.

    python examples/transformers_trainer.py
    torchrun --nproc_per_node 2 examples/transformers_trainer.py        # DDP
    python examples/transformers_trainer.py --resume                    # from the newest checkpoint

The model is made from a config: nothing is downloaded. Accumulation, max_grad_norm, bf16=True and
checkpoints are set as always in TrainingArguments. fp16=True, DeepSpeed and FSDP by the Trainer are
refused: for these see gpt.py, whose loop calls Engine.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from dist_looksam import LookSAM, TrainerMixin
from dist_looksam.cli.leave import leave

LENGTH, BATCH, ACCUMULATION = 32, 4, 2  # bytes; sequences of a micro-batch; micro-batches


class LookSAMTrainer(TrainerMixin, Trainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            params = list((model or self.model).parameters())  # the tied matrix is in it once
            groups = [
                {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
            ]
            base = torch.optim.AdamW(groups, lr=self.args.learning_rate)
            self.optimizer = LookSAM(params, base, rho=0.05, k=3, alpha=0.5, reuse="natural")
        return self.optimizer


class Sequences(Dataset):
    """The bytes of a text, cut into sequences."""

    def __init__(self, text: bytes) -> None:
        whole = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.parts = whole[: len(whole) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.parts[i], "labels": self.parts[i]}


def trainer_of(out: str, **settings: object) -> LookSAMTrainer:
    set_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    args = TrainingArguments(
        out,
        **{
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": 0.003,
            "max_grad_norm": 1.0,
            "max_steps": 60,
            "logging_steps": 10,
            "save_steps": 20,
            "report_to": "none",
            **settings,
        },
    )
    data = Sequences(Path(__file__).read_bytes())
    return LookSAMTrainer(GPT2LMHeadModel(config), args, train_dataset=data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/transformers", help="folder of checkpoints")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    trainer_of(asked.out).train(resume_from_checkpoint=asked.resume)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    leave(0)  # sys.exit(0), also where threads of gloo still run
