"""Fuzz the readers with Atheris, which looks for changes that reach new code.

    python -m tests.fuzzing.run [-max_total_time=600] [OPTION OF LIBFUZZER ...] [FILE]

Memory is limited; an input that breaks a reader is left in the folder that
`-artifact_prefix=` names, and given as FILE it is tried again.
"""

import resource
import sys
import tempfile
from pathlib import Path

import atheris

MEMORY = 2 << 30
"""Bytes that may be taken over those taken when all is imported."""

with atheris.instrument_imports(include=["tacq_vllm.format"]):
    from tacq_vllm.format.schema import LayoutName
    from tests.fuzzing.judge import judge
    from tests.fuzzing.mutations import (
        CHANGES,
        MAX_STEPS,
        STEP_BYTES,
        make_files,
        mutate,
    )

OPTIONS = (f"-max_len={MAX_STEPS * STEP_BYTES}", "-timeout=20")


def main() -> None:
    """Fuzz until told to stop."""
    with tempfile.TemporaryDirectory(prefix="tacq-fuzz-") as temporary:
        folder = Path(temporary)
        layouts: tuple[LayoutName, ...] = ("planes", "clusters")
        good = []
        for layout in layouts:
            good.append(make_files(folder, layout))
            assert judge(folder), f"the good checkpoint of {layout} is refused"
        counts = {False: 0, True: 0}

        def try_one(program: bytes) -> None:
            # The length says which: no change depends on a byte left over.
            mutate(good[len(program) % len(good)], program).write(folder)
            counts[judge(folder)] += 1
            if sum(counts.values()) % 500 == 0:
                print(f"{counts[False]} refused, {counts[True]} read", file=sys.stderr)

        limit_memory()
        # The seed: a change of each kind.
        corpus = folder / "corpus"
        corpus.mkdir()
        for kind in range(len(CHANGES)):
            program = bytes([kind % 3, kind]) + bytes(range(STEP_BYTES - 2))
            for length in range(STEP_BYTES, STEP_BYTES + len(good)):
                seed = program.ljust(length, b"\0")
                (corpus / f"{kind}-{length}").write_bytes(seed)
        program, *arguments = sys.argv
        atheris.Setup([program, *OPTIONS, *arguments, str(corpus)], try_one)
        atheris.Fuzz()


def limit_memory() -> None:
    """From here on, a reader that takes too much fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
