"""Sums that several programs have of the same rows, added up by the last of them."""

import triton
import triton.language as tl


@triton.jit
def add_up(
    counter_ptr,
    sums_ptr,
    bias_ptr,
    out_ptr,
    row_block,
    first_token,
    tokens,
    out_features,
    splits,
    first_job,
    last_job,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Count a program of a block of rows; the last one adds up what all have stored.

    That is what splits have, and jobs of the first TOKENS tokens from `first_job` to
    before `last_job`; STEP tokens are added up at a time.
    """
    # Every thread's sums are stored before one thread counts.
    tl.debug_barrier()
    programs = splits + last_job - first_job
    if tl.atomic_add(counter_ptr, 1, sem="release") == programs - 1:
        tl.atomic_xchg(counter_ptr, 0, sem="acquire")
        # That thread has seen all of them before any thread reads.
        tl.debug_barrier()
        rows = row_block * ROWS + tl.arange(0, ROWS)[:, None]
        size = tokens.to(tl.int64) * out_features
        for part in tl.static_range(TOKENS // STEP):
            token = first_token + part * STEP + tl.arange(0, STEP)[None, :]
            mask = (rows < out_features) & (token < tokens)
            places = sums_ptr + token.to(tl.int64) * out_features + rows
            total = tl.zeros([ROWS, STEP], tl.float32)
            for split in range(splits):
                sums = places + split * size
                total += tl.load(sums, mask=mask, other=0, cache_modifier=".cg")
            places = sums_ptr + splits * size + job_places(part, ROWS, TOKENS, STEP)
            for job in range(first_job, last_job):
                sums = places + job * (ROWS * TOKENS)
                total += tl.load(sums, cache_modifier=".cg")
            store(out_ptr, bias_ptr, total, rows, token, tokens, out_features, HAS_BIAS)


@triton.jit
def job_places(part, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr):
    """Where a job has its sums [ROWS, STEP] of some tokens, among those of all."""
    tokens = part * STEP + tl.arange(0, STEP)[None, :]
    return tl.arange(0, ROWS)[:, None] * TOKENS + tokens


@triton.jit
def store_sums(sums_ptr, total, split, rows, token, tokens, out_features):
    """Store a split's sums [rows, tokens]."""
    size = tokens.to(tl.int64) * out_features
    places = sums_ptr + split * size + token.to(tl.int64) * out_features + rows
    tl.store(places, total, mask=(rows < out_features) & (token < tokens))


@triton.jit
def store(
    out_ptr,
    bias_ptr,
    total,
    rows,
    token,
    tokens,
    out_features,
    HAS_BIAS: tl.constexpr,
):
    """Store whole sums [rows, tokens] and the bias."""
    is_row = rows < out_features
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=is_row, other=0).to(tl.float32)
    places = out_ptr + token.to(tl.int64) * out_features + rows
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(places, out, mask=is_row & (token < tokens))
