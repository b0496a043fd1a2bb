"""How a decode step's time divides: prints one table a profile that `bench_offline.py --profile FOLDER` wrote.

    python scripts/profile_table.py FOLDER [--rows 20]

A step is what lies between two launches of the sampler. Kernels are timed without CUDA graphs (XLA switches them off
under the profiler), so their durations hold and the gaps between them do not.
"""

import argparse
import collections
import itertools
import statistics
from pathlib import Path

import jax


def kernels(folder: Path) -> list[tuple[float, float, str]]:
    """(start in ns, duration in ns, name) of the GPU's kernels in the order they ran."""
    found = []
    for file in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    found += [(event.start_ns, event.duration_ns, event.name) for event in line.events]
    return sorted(found)


def steps(events: list[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """The kernels of each decode step: those between two runs of the least frequent kernel that runs in every step."""
    counts = collections.Counter(name for _, _, name in events)
    layers = counts[max((n for n in counts if "paged_decode" in n), key=counts.get, default=events[0][2])]
    once = [name for name, count in counts.items() if 16 <= count <= layers // 8]
    last = [name for _, _, name in events if name in once][-1]
    ends = [i for i, (_, _, name) in enumerate(events) if name == last]
    return [events[a + 1 : b + 1] for a, b in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20)
    args = parser.parse_args()
    for folder in sorted(path for path in args.folder.iterdir() if path.is_dir()):
        found = steps(kernels(folder))
        size = statistics.mode(len(step) for step in found)
        found = [step for step in found if len(step) == size]  # the same compiled step
        times, counts = collections.Counter(), collections.Counter()
        for step in found:
            for _, duration, name in step:
                times[name] += duration / len(found) / 1e3
                counts[name] += 1
        total = sum(times.values())
        print(f"{folder.name}: {len(found)} steps of {size} kernels, {total / 1e3:.3f} ms in kernels")
        for name, us in times.most_common(args.rows):
            number = counts[name] / len(found)
            print(f"  {us:9.1f} us {100 * us / total:5.1f} %  {number:5.1f} x {us / number:8.2f} us  {name[:90]}")


if __name__ == "__main__":
    main()
