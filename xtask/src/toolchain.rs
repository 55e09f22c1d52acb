//! The eBPF toolchain: a Rust compiler with the source of `core`, and a bpf-linker whose LLVM is not
//! older than the compiler's. What is there is used; what is missing is fetched by whichever way
//! works here.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::steps::{output, quietly, target};

/// The bpf-linker that the object is known to build with (docs/decisions/0003).
const LINKER_VERSION: &str = "0.13.0";

/// The tools that build the eBPF object.
pub struct Toolchain {
    /// `rustc`, with the source of `core` in its sysroot.
    pub rustc: PathBuf,
    /// The `cargo` that goes with it.
    pub cargo: PathBuf,
    /// `bpf-linker`.
    pub linker: PathBuf,
}

/// Finds the toolchain, fetching what is missing.
///
/// # Errors
/// If a part is missing and can't be fetched; says what to do by hand.
pub fn find() -> Result<Toolchain> {
    let compiler = match compiler() {
        Some(compiler) => compiler,
        None => fetch_compiler()?,
    };
    let llvm = compiler.llvm;
    let linker = match linker(llvm) {
        Some(linker) => linker,
        None => fetch_linker(llvm)?,
    };
    Ok(Toolchain { rustc: compiler.rustc, cargo: compiler.cargo, linker })
}

struct Compiler {
    rustc: PathBuf,
    cargo: PathBuf,
    /// The major version of its LLVM.
    llvm: u32,
}

/// The first compiler here that has the source of `core`.
fn compiler() -> Option<Compiler> {
    candidates().into_iter().find_map(|rustc| inspect(&rustc))
}

/// Compilers by preference: the one that cargo uses, a nightly of rustup, the system's own.
fn candidates() -> Vec<PathBuf> {
    let mut found =
        vec![env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from)];
    let nightly = ["which", "--toolchain", "nightly", "rustc"];
    found.extend(output(Command::new("rustup").args(nightly)).map(PathBuf::from));
    found.push(PathBuf::from("/usr/bin/rustc"));
    found
}

fn inspect(rustc: &Path) -> Option<Compiler> {
    // rustup's proxy would run another compiler under a later command: ask for the real one.
    let sysroot = PathBuf::from(output(Command::new(rustc).args(["--print", "sysroot"]))?);
    if !sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists() {
        return None;
    }
    let real = sysroot.join("bin/rustc");
    let version = output(Command::new(&real).arg("-vV"))?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    let cargo = sysroot.join("bin/cargo");
    cargo.exists().then_some(())?;
    Some(Compiler { rustc: real, cargo, llvm: llvm.split('.').next()?.parse().ok()? })
}

/// A way to fetch something: what it does, how long it takes, and the command.
type Way = (&'static str, &'static str, Command);

fn fetch_compiler() -> Result<Compiler> {
    eprintln!("eBPF toolchain: no Rust compiler with the source of `core` (rust-src) here");
    let mut problems = Vec::new();
    for (what, duration, mut command) in compiler_ways() {
        if let Err(problem) = quietly(what, duration, &mut command) {
            problems.push(format!("- {problem:#}"));
        } else if let Some(compiler) = compiler() {
            return Ok(compiler);
        }
    }
    bail!(
        "no Rust compiler with the source of `core` could be found or fetched.\n{}\n\
         Install one by hand, either way:\n  \
         rustup toolchain install nightly --profile minimal --component rust-src\n  \
         apt-get install rustc-web cargo-web rust-web-src    (Debian, as root)",
        problems.join("\n")
    )
}

fn compiler_ways() -> Vec<Way> {
    let mut ways = Vec::new();
    if has("rustup") {
        let mut component = Command::new("rustup");
        component.args(["component", "add", "rust-src"]);
        ways.push(("fetching rust-src with rustup", "10 s", component));
        let mut nightly = Command::new("rustup");
        nightly.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
        nightly.args(["--component", "rust-src"]);
        ways.push(("fetching a nightly compiler with rustup", "1 min", nightly));
    }
    if has("apt-get") {
        ways.push(("updating Debian's package lists", "10 s", apt(&["update"])));
        let packages = ["install", "-y", "rustc-web", "cargo-web", "rust-web-src"];
        ways.push(("installing Debian's compiler and its source", "1 min", apt(&packages)));
    }
    ways
}

/// A bpf-linker that fits: ours, or one on the PATH.
fn linker(llvm: u32) -> Option<PathBuf> {
    let ours = linker_root(llvm).join("bin/bpf-linker");
    if ours.exists() {
        return Some(ours);
    }
    let on_path = find_on_path("bpf-linker")?;
    // It does not say which LLVM it has; from 0.13 on it is one that current compilers fit.
    let version = output(Command::new(&on_path).arg("--version"))?;
    let minor = version.strip_prefix("bpf-linker 0.")?.split('.').next()?.parse::<u32>().ok()?;
    (minor >= 13).then_some(on_path)
}

fn linker_root(llvm: u32) -> PathBuf {
    target().join(format!("tools/bpf-linker-{LINKER_VERSION}-llvm-{llvm}"))
}

fn fetch_linker(llvm: u32) -> Result<PathBuf> {
    eprintln!("eBPF toolchain: no bpf-linker with LLVM {llvm} or later here");
    let mut prefix = llvm_prefix(llvm);
    if prefix.is_none() && has("apt-get") {
        let packages = [
            format!("llvm-{llvm}-dev"),
            format!("libclang-{llvm}-dev"),
            format!("libpolly-{llvm}-dev"),
        ];
        install(&format!("Debian's LLVM {llvm}"), "1 min", &packages)
            .with_context(|| by_hand(llvm))?;
        prefix = llvm_prefix(llvm);
    }
    let mut build = Command::new("cargo");
    build.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--root"]);
    build.arg(linker_root(llvm));
    if let Some(prefix) = prefix {
        let path = env::var("PATH").unwrap_or_default();
        build.args(["--no-default-features", "--features", &format!("llvm-{llvm}")]);
        build.env("PATH", format!("{}/bin:{path}", prefix.display()));
        build.env("LLVM_PREFIX", prefix);
    }
    quietly("building bpf-linker", "1 min", &mut build).with_context(|| by_hand(llvm))?;
    linker(llvm).with_context(|| by_hand(llvm))
}

/// Makes sure that a program is there which tests call, from Debian's package of the same name.
///
/// # Errors
/// If it is missing and can't be fetched.
pub fn need(program: &str, package: &str) -> Result<()> {
    // Debian puts such programs where only root's PATH looks.
    if has(program) || Path::new("/usr/sbin").join(program).is_file() {
        return Ok(());
    }
    if has("apt-get") {
        return install(&format!("Debian's {package}"), "10 s", &[package.to_owned()]);
    }
    bail!("the tests need {program}: install it")
}

fn by_hand(llvm: u32) -> String {
    format!(
        "bpf-linker could not be made. By hand: install LLVM {llvm}'s development files, then\n  \
         LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install bpf-linker --version {LINKER_VERSION} \
         --no-default-features --features llvm-{llvm} --locked"
    )
}

fn llvm_prefix(llvm: u32) -> Option<PathBuf> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    let files = [format!("lib/libLLVM-{llvm}.so"), "include/llvm-c/Core.h".to_owned()];
    files.iter().all(|file| prefix.join(file).exists()).then_some(prefix)
}

fn apt(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Installs Debian packages, after an update of the package lists if it fails without.
fn install(what: &str, duration: &str, packages: &[String]) -> Result<()> {
    let what = format!("installing {what}");
    let install = || {
        let mut install = apt(&["install", "-y"]);
        install.args(packages);
        install
    };
    if quietly(&what, duration, &mut install()).is_ok() {
        return Ok(());
    }
    quietly("updating Debian's package lists", "10 s", &mut apt(&["update"]))?;
    quietly(&what, duration, &mut install())
}

fn has(program: &str) -> bool {
    find_on_path(program).is_some()
}

fn find_on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}
