//! Builds the eBPF object and the `portal` binary that carries it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::steps::{cargo, openly, root, target};
use crate::{object, toolchain};

/// The environment variable by which proxy-user's build script finds the object to embed.
pub const OBJECT_VARIABLE: &str = "PORTAL_EBPF_OBJECT";

/// What rustc is told beside cargo's own flags; docs/decisions/0003 says why each.
const RUSTFLAGS: [&str; 3] =
    ["-Cdebuginfo=2", "-Clink-arg=--btf", "-Clink-arg=--disable-expand-memcpy-in-order"];

#[derive(clap::Args)]
pub struct Args {
    /// Build with debug assertions and without optimisation
    #[arg(long)]
    debug: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let binary = binary(!args.debug)?;
    println!("{}", binary.display());
    Ok(())
}

/// Builds the eBPF object and returns its path. Costs nothing if nothing has changed.
pub fn ebpf_object() -> Result<PathBuf> {
    ebpf("portal-ebpf")
}

/// Builds the object with the bench's own programs and returns its path.
pub fn ebpf_bench() -> Result<PathBuf> {
    ebpf("portal-bench")
}

/// Builds an object of proxy-ebpf's.
fn ebpf(name: &str) -> Result<PathBuf> {
    let tools = toolchain::find()?;
    let folder = target().join("bpf");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tools_folder = tools.linker.parent().context("bpf-linker has a folder")?.to_owned();
    let paths = std::iter::once(tools_folder).chain(std::env::split_paths(&path));
    let mut build = Command::new(&tools.cargo);
    build
        .current_dir(root())
        .args(["build", "--quiet", "--package", "proxy-ebpf", "--bin", name, "--release"])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
        .arg(&folder)
        .env("RUSTC", &tools.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        .env("PATH", std::env::join_paths(paths)?)
        // Set by the cargo and the rustup that run us, for another compiler.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .env_remove("RUSTC_WRAPPER");
    openly(&mut build).context("the eBPF object does not build")?;
    let linked = folder.join("bpfel-unknown-none/release").join(name);
    let finished = folder.join(name).with_extension("o");
    object::finish(&linked, &finished)?;
    Ok(finished)
}

/// Builds the `portal` binary, the object inside, and returns its path.
pub fn binary(release: bool) -> Result<PathBuf> {
    let object = ebpf_object()?;
    let mut build = cargo();
    build.args(["build", "--package", "proxy-user", "--bin", "portal"]);
    build.env(OBJECT_VARIABLE, object);
    if release {
        build.arg("--release");
    }
    openly(&mut build).context("portal does not build")?;
    let binary = target().join(if release { "release" } else { "debug" }).join("portal");
    fs::metadata(&binary).with_context(|| format!("{} was not built", binary.display()))?;
    Ok(binary)
}
