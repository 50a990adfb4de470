"""The Vision Transformer (pre-norm, learned positions), its published variants, and its FLOPs."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_DRAW_SEED = 0  # the same for all runs: their seeds put other samples at the place of a key
_FIRST_STREAM = 1000  # augmentation draws from the same keys with lower streams: data/draws.py


@dataclass(frozen=True, kw_only=True)
class Size:
    """One named ViT.

    patch            side in pixels. dim: width, `heads` x the width of a head. depth: blocks.
    class_token      the head takes a token of its own; else the mean over the patches' tokens.
    class_position   that token has a position, too, the first.
    registers        further tokens that the head does not take (arXiv:2309.16588).
    layer_scale      first value of LayerScale's gamma, a factor of each entry of a branch
                     (arXiv:2103.17239); 0: there is none.
    qk_norm          LayerNorm of each head's q and k (arXiv:2302.05442).
    """

    patch: int
    dim: int
    depth: int
    heads: int
    class_token: bool = False
    class_position: bool = False
    registers: int = 0
    layer_scale: float = 0.0
    qk_norm: bool = False

    @property
    def added_tokens(self) -> int:
        """Tokens before those of the patches: of the class, then registers."""
        return self.class_token + self.registers


def kept_branches(n: int, rates: Tensor, keys: Tensor | None) -> Tensor:
    """Factors of the residual branches of n samples: [branches, n], fp32, 0 or 1 / (1 - rate).

    A branch is dropped for whole samples. With `keys` (int64 [n]) a hash of (keys[i], branch)
    decides for sample i: the same on any number of ranks, at any micro-batch size, and in both
    passes of a look. Without keys torch's generator decides.
    `rates` [branches] is on the device of the keys. Source: Huang et al., arXiv:1603.09382.
    """
    if keys is None:
        draws = torch.rand(len(rates), n, device=rates.device)
    else:
        from ..data.draws import uniform

        streams = torch.arange(_FIRST_STREAM, _FIRST_STREAM + len(rates), device=keys.device)
        draws = uniform(_DRAW_SEED, keys, streams[:, None])
    return (draws >= rates[:, None]).float() / (1 - rates[:, None]).float()


class Attention(nn.Module):
    """Multi-head self-attention, [n, tokens, dim] -> the same shape."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.normed = qk_norm
        if qk_norm:
            self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6)
            self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.normed:  # autocast computes norms in fp32
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A factor for each entry of a branch's output, [n, tokens, dim] -> the same shape."""

    def __init__(self, dim: int, first: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), first))

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch may drop out in training."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.dim, eps=1e-6)
        self.attn = Attention(size.dim, size.heads, qk_norm=size.qk_norm)
        self.norm2 = nn.LayerNorm(size.dim, eps=1e-6)
        self.fc1 = nn.Linear(size.dim, 4 * size.dim)
        self.fc2 = nn.Linear(4 * size.dim, size.dim)
        self.scales = size.layer_scale > 0
        if self.scales:
            self.ls1 = LayerScale(size.dim, size.layer_scale)
            self.ls2 = LayerScale(size.dim, size.layer_scale)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """[n, tokens, dim] -> the same shape. kept: [2, n], factors of the two branches."""
        attention = self.attn(self.norm1(x))
        if self.scales:
            attention = self.ls1(attention)
        x = x + _scaled(attention, None if kept is None else kept[0])
        mlp = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        if self.scales:
            mlp = self.ls2(mlp)
        return x + _scaled(mlp, None if kept is None else kept[1])


def _scaled(branch: Tensor, kept: Tensor | None) -> Tensor:
    return branch if kept is None else branch * kept.to(branch.dtype)[:, None, None]


@lru_cache(maxsize=64)
def _resizing(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix [new, old] that resizes a column of `old` numbers: bicubic, antialiased."""
    unit_columns = torch.eye(old)[None, None]
    resized = F.interpolate(unit_columns, size=(new, old), mode="bicubic", antialias=True)
    return resized[0, 0].to(device)


class ViT(nn.Module):
    """Images [n, C, H, W] -> logits [n, num_classes]; no buffers.

    The head takes the class token after the last LayerNorm, or the mean over the patches' tokens.
    The head's initialisation is normal with std 0.02: a head of zeros, as others use, would hardly
    grow under LAMB and LARS, whose steps are relative to ||w_i||. Class token and registers start
    likewise, as DeiT's class token. Blocks are Xavier uniform (q, k and v each), which is about std
    0.03 at dim 768 and more in narrow models: with std 0.02 everywhere the 64-wide `vit_8` reaches
    69 % on digits after 150 steps of AdamW, with Xavier 95 %.
    `image_shape` is (C, H, W); H and W must be multiples of `size.patch`. `drop_path` is the rate
    of the last block; earlier blocks have proportionally less, the first none.
    Source: Dosovitskiy et al., arXiv:2010.11929; mean over tokens as in Beyer et al.,
    arXiv:2205.01580; initialisation as in their code, big_vision.
    """

    takes_keys = True

    def __init__(
        self,
        size: Size,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.size = size
        self.grid = (height // size.patch, width // size.patch)
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Linear(channels * size.patch**2, size.dim)
        if size.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, size.dim))
        if size.registers:
            self.reg_token = nn.Parameter(torch.empty(1, size.registers, size.dim))
        positions = self.num_patches + size.class_position
        self.pos_embed = nn.Parameter(torch.empty(1, positions, size.dim))
        self.drop_path = drop_path
        self.checkpoints = False  # of each block only the input is kept for backward
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        self.head = nn.Linear(size.dim, num_classes)
        self._init_weights()

    @property
    def num_tokens(self) -> int:
        """Tokens of an image in the blocks."""
        return self.num_patches + self.size.added_tokens

    def _init_weights(self) -> None:
        dim = self.size.dim
        nn.init.normal_(self.pos_embed, std=dim**-0.5)
        for name in ("cls_token", "reg_token"):
            if (token := getattr(self, name, None)) is not None:
                nn.init.trunc_normal_(token, std=0.02, a=-0.04, b=0.04)
        for end in (self.patch_embed, self.head):
            nn.init.trunc_normal_(end.weight, std=0.02, a=-0.04, b=0.04)
            nn.init.zeros_(end.bias)
        for name, weight in self.blocks.named_parameters():
            if name.endswith("qkv.weight"):
                for part in weight.detach().split(dim):
                    nn.init.xavier_uniform_(part)
            elif weight.ndim == 2:
                nn.init.xavier_uniform_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def _patches(self, images: Tensor) -> Tensor:
        n, c, height, width = images.shape
        p = self.size.patch
        cut = images.view(n, c, height // p, p, width // p, p)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)

    def _positions(self, height: int, width: int) -> Tensor:
        """pos_embed, resized to images of other sides by a product of matrices, whose gradient has
        the same bits every time, which that of torch's interpolate has not on a GPU."""
        grid = height // self.size.patch, width // self.size.patch
        if grid == self.grid:
            return self.pos_embed
        like, own = self.pos_embed, int(self.size.class_position)
        rows, columns = (_resizing(*sides, like.device) for sides in zip(self.grid, grid))
        table = like[:, own:].unflatten(1, self.grid)
        with torch.autocast(like.device.type, enabled=False):  # else the residual stream, to which
            resized = torch.einsum(  # positions are added, would have 16 bits, too
                "yh,xw,nhwd->nyxd", rows.to(like.dtype), columns.to(like.dtype), table
            ).flatten(1, 2)
        return torch.cat([like[:, :own], resized], 1) if own else resized

    def _tokens(self, images: Tensor) -> Tensor:
        """The first block's input [n, tokens, dim]: class token, registers, patches."""
        x, size = self.patch_embed(self._patches(images)), self.size
        place = self._positions(*images.shape[-2:])
        first = []
        if size.class_token:
            own = place[:, :1] if size.class_position else 0
            first.append((self.cls_token + own).expand(len(x), -1, -1))
        if size.registers:
            first.append(self.reg_token.expand(len(x), -1, -1))
        x = x + place[:, int(size.class_position) :]
        return torch.cat([*first, x], 1) if first else x

    def _pooled(self, x: Tensor) -> Tensor:
        """What the head takes, [n, dim]."""
        x = self.norm(x)
        return x[:, 0] if self.size.class_token else x[:, self.size.added_tokens :].mean(1)

    def _kept(self, n: int, keys: Tensor | None, device: torch.device) -> Tensor | None:
        """Factors of all blocks' branches, by one draw; None where nothing is dropped."""
        if not self.training or self.drop_path == 0:
            return None
        depth = self.size.depth
        rates = torch.arange(depth, dtype=torch.float64, device=device).repeat_interleave(2)
        return kept_branches(n, self.drop_path * rates / max(1, depth - 1), keys)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits [n, num_classes]. The sides of images may be other multiples of the patch than
        those of `image_shape`: the positions are interpolated.

        `keys`, int64 [n] on the images' device, are the seeds of drop-path. They must differ
        between steps, or a sample always loses the same branches.
        """
        x = self._tokens(images)
        kept = self._kept(len(x), keys, x.device)
        for i, block in enumerate(self.blocks):
            own = None if kept is None else kept[2 * i : 2 * i + 2]
            if self.checkpoints and self.training and torch.is_grad_enabled():
                # Blocks draw nothing themselves, so that there is no random state to keep.
                x = checkpoint(block, x, own, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, own)
        return self.head(self._pooled(x))

    def flops_per_image(self) -> int:
        """Forward floating point operations of one image: 2 per multiply-add of matrix products.

        LayerNorm, GELU, softmax and additions (about 1 %) are not counted. A backward costs twice
        this.
        """
        tokens, dim = self.num_tokens, self.size.dim
        attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
        mlp = 8 * tokens * dim * dim
        ends = self.num_patches * self.patch_embed.weight.numel() + self.head.weight.numel()
        return 2 * (self.size.depth * (attention + mlp) + ends)
