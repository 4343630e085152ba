"""Run all benchmarks; each prints one JSON line for each measurement. ``--threads N`` sets torch's threads."""

from __future__ import annotations

import argparse

import accuracy
import batches
import certificates
import cleaning
import curves
import flat
import general
import large_logistic
import meta
import networks
import outer
import overhead
import quadratic
import structured
import torch
import unroll

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1: steadier on a busy machine)")
    torch.set_num_threads(parser.parse_args().threads)
    benchmarks = (
        *(accuracy, unroll, flat, quadratic, large_logistic, structured, general, networks, batches, overhead, curves),
        *(certificates, cleaning, meta, outer),
    )
    passed = [benchmark.main() for benchmark in benchmarks]
    raise SystemExit(not all(passed))
