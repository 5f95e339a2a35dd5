"""LookupViT's block written out, token by token and head by head."""

from typing import Any

import torch
from torch import Tensor


def block(layer: Any, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of one image, (M, D) and (N, D) -> the same, as `LookupViTBlock` in evaluation mode has them."""
    heads, size = range(layer.attention.q_proj.out_features // layer.attention.head_dim), layer.attention.head_dim
    root = size**0.5

    def part(vector: Tensor, head: int) -> Tensor:
        return vector[head * size : (head + 1) * size]

    def averages(logits: Any, values: list[Tensor], count: int) -> list[Tensor]:
        """For each of `count` tokens, the values weighed by the softmax of `logits(token, value, head)`."""
        results = []
        for token in range(count):
            weighed = []
            for head in heads:
                scores = [logits(token, value, head).exp() for value in range(len(values))]
                weighed.append(sum(s * part(v, head) for s, v in zip(scores, values, strict=True)) / sum(scores))
            results.append(torch.cat(weighed))
        return results

    # gather
    gather = layer.gather
    queries = [gather.q_proj(gather.compressed_norm(token)) for token in compressed]
    keys = [gather.k_proj(gather.lookup_norm(token)) for token in lookup]
    values = [gather.v_proj(gather.lookup_norm(token)) for token in lookup]

    def logit(m: int, n: int, head: int) -> Tensor:
        return part(queries[m], head) @ part(keys[n], head) / root

    tokens = list(compressed)
    gathered = averages(logit, values, len(tokens))
    tokens = [token + gather.o_proj(found) for token, found in zip(tokens, gathered, strict=True)]

    # refine
    attention, normed = layer.attention, [layer.layernorm_before(token) for token in tokens]
    own_queries, own_keys, own_values = (
        [projection(token) for token in normed] for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended = averages(
        lambda i, j, head: part(own_queries[i], head) @ part(own_keys[j], head) / root, own_values, len(tokens)
    )
    tokens = [token + attention.o_proj(found) for token, found in zip(tokens, attended, strict=True)]
    tokens = [token + layer.mlp(layer.layernorm_after(token)) for token in tokens]

    # infuse: the attention of gathering, with the tokens in each other's place
    infuse = layer.infuse
    values = [infuse.v_proj(infuse.norm(token)) for token in tokens]
    if infuse.reuses_weights:
        found = []
        for n in range(len(lookup)):
            parts = []
            for head in heads:
                shares = [
                    logit(m, n, head).exp() / sum(logit(m, other, head).exp() for other in range(len(lookup)))
                    for m in range(len(tokens))
                ]
                found_here = sum(share * part(value, head) for share, value in zip(shares, values, strict=True))
                parts.append(found_here * len(lookup) / len(tokens))
            found.append(torch.cat(parts))
    else:
        found = averages(lambda n, m, head: logit(m, n, head), values, len(lookup))
    grid = [token + infuse.o_proj(one) for token, one in zip(lookup, found, strict=True)]
    grid = [token + layer.lookup_mlp(layer.lookup_norm(token)) for token in grid]
    return torch.stack(tokens), torch.stack(grid)
