//! Format and lints, warnings being errors.

use anyhow::{Context, Result};

use crate::steps::{cargo, openly};

pub fn run() -> Result<()> {
    openly(cargo().args(["fmt", "--all", "--check"])).context("run `cargo fmt --all`")?;
    let strict = ["--", "--deny", "warnings"];
    let host = ["clippy", "--quiet", "--workspace", "--all-targets"];
    openly(cargo().args(host).args(strict))?;
    let all = ["clippy", "--quiet", "--package", "proxy-user", "--all-targets", "--all-features"];
    openly(cargo().args(all).args(strict))?;
    // The hooks, which only feature `lint` shows to a compiler for the host.
    let ebpf = ["clippy", "--quiet", "--package", "proxy-ebpf", "--features", "lint"];
    openly(cargo().args(ebpf).args(strict))
}
