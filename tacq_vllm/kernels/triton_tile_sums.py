"""Sums that several programs have of the same rows, added up by the last of them."""

import triton
import triton.language as tl


@triton.jit
def add_up(
    counters_ptr,
    job_starts_ptr,
    sums_ptr,
    bias_ptr,
    out_ptr,
    row_block,
    tokens,
    out_features,
    splits,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_BLOCKS: tl.constexpr,
):
    """Count a program of a block of rows; the last one adds up what all have stored."""
    token_block = tl.program_id(2)
    first_job = tl.load(job_starts_ptr + row_block)
    last_job = tl.load(job_starts_ptr + row_block + 1)
    # Every thread's sums are stored before one thread counts.
    tl.debug_barrier()
    counter = counters_ptr + row_block * TOKEN_BLOCKS + token_block
    programs = splits + last_job - first_job
    if tl.atomic_add(counter, 1, sem="release") == programs - 1:
        tl.atomic_xchg(counter, 0, sem="acquire")
        rows = row_block * ROWS + tl.arange(0, ROWS)[:, None]
        size = tokens.to(tl.int64) * out_features
        for part in tl.static_range(TOKENS // 8):
            token = token_block * TOKENS + part * 8 + tl.arange(0, 8)[None, :]
            mask = (rows < out_features) & (token < tokens)
            places = sums_ptr + token.to(tl.int64) * out_features + rows
            total = tl.zeros([ROWS, 8], tl.float32)
            for split in range(splits):
                sums = places + split * size
                total += tl.load(sums, mask=mask, other=0, cache_modifier=".cg")
            places = job_places(
                sums_ptr, part, tokens, out_features, splits, ROWS, TOKENS
            )
            for job in range(first_job, last_job):
                sums = places + job * tl.num_programs(2) * (ROWS * TOKENS)
                total += tl.load(sums, cache_modifier=".cg")
            store(out_ptr, bias_ptr, total, rows, token, tokens, out_features, HAS_BIAS)


@triton.jit
def job_places(
    sums_ptr,
    part,
    tokens,
    out_features,
    splits,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Where the first job has its sums [ROWS, 8] of eight tokens."""
    places = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, 8)[None, :] + part * 8
    places += tl.program_id(2) * (ROWS * TOKENS)
    return sums_ptr + tokens.to(tl.int64) * out_features * splits + places


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
    """Store sums [rows, 8] and the bias."""
    is_row = rows < out_features
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=is_row, other=0).to(tl.float32)
    places = out_ptr + token.to(tl.int64) * out_features + rows
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(places, out, mask=is_row & (token < tokens))
