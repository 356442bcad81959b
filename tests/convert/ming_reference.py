"""Ming-Lite-Omni in plain torch, from the facts that its makers published, for comparison only: names of tensors as in
the published files, every expert looked up token by token, one sequence without packing. It shares no code with the
package. The vision tower is transformers' Qwen2.5-VL's, which the published one copies.

Legend  T tokens, V visual tokens, H hidden size, N heads, G key-value heads, D head size, K experts of a token.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel


class Norm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class Mlp(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """Softmax in fp32 over all experts, the best K, their weights brought to a sum of 1; and the shared experts."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        size, inner, count = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
        self.top_k = c["num_experts_per_tok"]
        self.experts = nn.ModuleList(Mlp(size, inner) for _ in range(count))
        for gate in ("gate", "image_gate", "audio_gate"):
            self.add_module(gate, nn.Linear(size, count, bias=False))
        self.shared_experts = Mlp(size, inner * c["num_shared_experts"])
        self.chosen: list[list[int]] = []

    def forward(self, x: Tensor, gates: list[str]) -> Tensor:
        self.chosen, routed = [], []
        for token, gate in zip(x, gates, strict=True):
            best, which = self.get_submodule(gate)(token).float().softmax(dim=-1).topk(self.top_k)
            self.chosen.append(sorted(which.tolist()))
            outputs = torch.stack([self.experts[expert](token) for expert in which.tolist()])
            routed.append((best / best.sum()) @ outputs)
        return torch.stack(routed) + self.shared_experts(x)


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.groups, self.size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.query_key_value = nn.Linear(c["hidden_size"], (self.heads + 2 * self.groups) * self.size, bias=False)
        self.dense = nn.Linear(self.heads * self.size, c["hidden_size"], bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.query_key_value(x).view(len(x), -1, self.size).transpose(0, 1)  # [N + 2 G, T, D]
        q, k, v = qkv.split([self.heads, self.groups, self.groups])
        half = self.size // 2
        q, k = (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=0) for y in (k, v))
        scores = q @ k.transpose(1, 2) / self.size**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        return self.dense((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any], number: int) -> None:
        super().__init__()
        dense = number < c["first_k_dense_replace"]
        self.attention = Attention(c)
        self.mlp = Mlp(c["hidden_size"], c["intermediate_size"]) if dense else Mixture(c)
        self.input_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, gates: list[str]) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), cos, sin)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, gates) if isinstance(self.mlp, Mixture) else self.mlp(normed))


class Trunk(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, number) for number in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])


class CausalLm(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.model = Trunk(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)


class Ming(nn.Module):
    """The whole model, from its ``config.json``, with stand-ins for what hears."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.c: dict[str, Any] = config["llm_config"]
        tower = Qwen2_5_VLConfig(vision_config=config["vision_config"]).vision_config
        tower._attn_implementation = "sdpa"
        self.vision = Qwen2_5_VisionTransformerPretrainedModel(tower)
        merged, size = config["vision_config"]["out_hidden_size"], self.c["hidden_size"]
        self.linear_proj = nn.Sequential(nn.Linear(merged, size), nn.GELU(), nn.Linear(size, size))
        self.audio, self.linear_proj_audio = nn.Linear(3, 5), nn.Sequential(nn.Conv1d(5, size, 3))
        self.model = CausalLm(self.c)

    def forward(self, ids: Tensor, patches: Tensor, grids: Tensor) -> Tensor:
        """Logits ``[T, vocab]`` of int64 ``[T]`` ids."""
        trunk, weight = self.model.model, self.model.lm_head.weight
        seen: Any = self.vision(patches, grid_thw=grids)
        visual = F.normalize(self.linear_proj(getattr(seen, "pooler_output", seen)), dim=-1)
        is_image = ids == self.c["image_patch_token"]
        x = trunk.word_embeddings(ids)
        x = x.masked_scatter(is_image[:, None].expand_as(x), visual)
        gates = ["image_gate" if image and self.c["multi_gate"] else "gate" for image in is_image.tolist()]
        cos, sin = self.rotary(ids, grids)
        for layer in trunk.layers:
            x = layer(x, cos, sin, gates)
        if self.c["norm_head"]:
            weight = weight / (weight.norm(p=2, dim=0, keepdim=True) + 1e-7).detach()
        return F.linear(trunk.norm(x), weight)

    def rotary(self, ids: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[T, D]``: by one position, or ``3D`` by time, height and width in chunks of frequencies."""
        size = self.c["head_dim"]
        frequencies = self.c["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
        if self.c["rope_scaling"] is None:
            angles = torch.arange(len(ids))[:, None] * frequencies
        else:
            axes = [axis for axis, count in enumerate(self.c["rope_scaling"]["mrope_section"]) for _ in range(count)]
            angles = torch.tensor(list(self.places(ids.tolist(), grids.tolist())))[:, axes] * frequencies
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def places(self, ids: list[int], grids: list[list[int]]) -> Iterator[tuple[int, int, int]]:
        """Time, height and width of every token: an image's count from where it begins, text goes on behind the
        largest."""
        images, begin, at = iter(grids), 0, 0
        while at < len(ids):
            if ids[at] != self.c["image_patch_token"]:
                yield begin, begin, begin
                begin, at = begin + 1, at + 1
                continue
            _, rows, columns = next(images)
            rows, columns = rows // 2, columns // 2
            yield from ((begin, begin + row, begin + column) for row in range(rows) for column in range(columns))
            begin, at = begin + max(rows, columns), at + rows * columns
