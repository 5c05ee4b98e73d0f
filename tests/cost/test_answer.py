"""What an answer takes: FLOPs as counted elsewhere, and a roofline by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmscale.cost.answer import Asked, answer_flops, roofline_ms, served, vocab_rows
from vlmscale.cost.flops import decoder_flops, inference_flops
from vlmscale.cost.peak import Device
from vlmscale.models.sizes import SIZES


@given(st.sampled_from(sorted(SIZES)), st.integers(1, 700), st.integers(0, 40))
def test_flops_are_those_of_inference(name: str, prompt: int, generated: int) -> None:
    size, rows = SIZES[name], vocab_rows(name)
    own = answer_flops(served(size, rows, 2), Asked(prompt, generated))
    assert own == pytest.approx(inference_flops(size, rows, prompt, generated), rel=1e-12)


def test_the_image_and_the_query_pass_are_added() -> None:
    size = SIZES["qwen1.5-0.5b"]
    llm = served(size, size.vocab_size, 2)
    more = answer_flops(llm, Asked(66, 10, 1, 3e11, 50)) - answer_flops(llm, Asked(66, 10))
    assert more == pytest.approx(3e11 + decoder_flops(size, 50, 0))


def test_a_served_llm() -> None:
    """Qwen2.5-0.5B: 24 layers, 14 heads of 64 with 2 for keys, tied embeddings of 151,936 x 896."""
    llm = served(SIZES["qwen2.5-0.5b"], 151_936, 2)
    assert llm.params == 494_032_768  # as its model card has it, 0.49B
    assert llm.head == 151_936 * 896
    assert llm.attention == 24 * 14 * 64
    assert llm.kv_bytes == 24 * 2 * 2 * 64 * 2
    norms_and_biases = 24 * (2 * 896 + 14 * 64 + 2 * 2 * 64) + 896
    assert llm.linear == llm.params - llm.head - norms_and_biases


def test_a_roofline_is_the_longer_of_products_and_memory() -> None:
    llm = served(SIZES["qwen1.5-7b"], 151_936, 2)
    weights = 2 * (llm.linear + llm.head)
    slow_memory, slow_products = Device("a", 1e30, 1e12), Device("b", 1e12, 1e30)
    read = weights * 10 + llm.kv_bytes * 8 * sum(66 + i for i in range(1, 10))
    asked = Asked(66, 10, batch=8, image_flops=4e11)
    assert roofline_ms(llm, asked, slow_memory, 2) == pytest.approx(1e3 * read / 1e12)
    flops = 8 * answer_flops(llm, asked)
    assert roofline_ms(llm, asked, slow_products, 2) == pytest.approx(1e3 * flops / 1e12)
    both = Device("c", 1e12, 1e12)
    assert roofline_ms(llm, asked, both, 2) >= max(
        roofline_ms(llm, asked, device, 2) for device in (slow_memory, slow_products)
    )
    query = Asked(66, 10, batch=8, image_flops=4e11, query=50)
    assert roofline_ms(llm, query, slow_memory, 2) == pytest.approx(1e3 * (read + weights) / 1e12)


def test_of_a_prefill_alone_no_token_is_decoded() -> None:
    llm = served(SIZES["qwen1.5-0.5b"], 151_936, 2)
    device = Device("a", 1e12, 1e30)
    assert roofline_ms(llm, Asked(66, 1), device, 2) == pytest.approx(answer_flops(llm, Asked(66, 1)) / 1e9)
    assert roofline_ms(llm, Asked(66, 0), device, 2) == pytest.approx(answer_flops(llm, Asked(66, 0)) / 1e9)
