//! Other kernels: Debian's, in qemu without hardware support. Each loads every program, runs the kernel
//! tier, and a small network scene.

mod guest;
mod kernel;
mod machine;
mod modules;

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::build::{self, OBJECT_VARIABLE};
use crate::steps::{cargo, target};
use crate::toolchain;
use guest::Guest;
use kernel::{KERNELS, Release};
use machine::{Emulator, Ended};

#[derive(clap::Args)]
pub struct Args {
    /// Which kernels: 5.10, 6.1, 6.12, newest; all of them if none is given
    kernels: Vec<String>,

    /// Only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
}

/// What is run on each kernel: a file of proxy-user's tests.
const TESTS: [&str; 2] = ["kernel", "kernels"];

pub fn run(args: &Args) -> Result<()> {
    let wanted = wanted(&args.kernels)?;
    let tested = run_on(&wanted, args.filter.as_deref())?;
    if tested == 0 {
        bail!("no kernel could be fetched, so nothing was tested");
    }
    Ok(())
}

/// Runs the tests on one kernel that is not the machine's own, if it can be had here.
pub fn run_one(filter: Option<&str>) -> Result<()> {
    run_on(&[&KERNELS[0]], filter).map(drop)
}

fn wanted(names: &[String]) -> Result<Vec<&'static Release>> {
    if names.is_empty() {
        return Ok(KERNELS.iter().collect());
    }
    let find = |name: &String| {
        KERNELS.iter().find(|kernel| kernel.name == name).with_context(|| {
            let known: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
            format!("there is no kernel {name} to test on, but {}", known.join(", "))
        })
    };
    names.iter().map(find).collect()
}

/// Says how many kernels were tested on: what can't be had here is named and passed over.
fn run_on(kernels: &[&Release], filter: Option<&str>) -> Result<usize> {
    toolchain::need("bpftool", "bpftool")?;
    let programs = programs()?;
    let folder = target().join("vm");
    let emulator = Emulator::find(&folder);
    let mut results = Vec::new();
    for release in kernels {
        let both = match &emulator {
            Ok(emulator) => kernel::fetch(release, &folder).map(|kernel| (emulator, kernel)),
            Err(error) => Err(anyhow!("{error:#}")),
        };
        let result = both.map(|(emulator, kernel)| {
            Guest { kernel: &kernel, emulator, programs: &programs }.run(filter)
        });
        let words = match result {
            // What can't be fetched here is no failure of ours, and no success either.
            Err(error) => format!("skipped: {error:#}"),
            Ok(Ok(Ended::Passed)) => "passed".to_owned(),
            Ok(Ok(Ended::Failed(why))) => format!("FAILED: {why}"),
            Ok(Err(error)) => format!("FAILED: {error:#}"),
        };
        results.push((release, words));
    }
    println!();
    for (release, words) in &results {
        println!("Linux {:7} {words}", release.name);
    }
    if results.iter().any(|(_, words)| words.starts_with("FAILED")) {
        bail!("not all kernels passed");
    }
    Ok(results.iter().filter(|(_, words)| !words.starts_with("skipped")).count())
}

/// The programs that go into the machine.
pub struct Programs {
    /// The tests.
    tests: Vec<PathBuf>,
    /// What the tests start or load.
    files: Vec<PathBuf>,
    /// The eBPF object.
    object: PathBuf,
}

/// Builds them.
fn programs() -> Result<Programs> {
    build::binary(false)?;
    let object = build::ebpf_object()?;
    let mut tests = cargo();
    tests.args(["test", "--package", "proxy-user", "--features", "testing", "--quiet", "--no-run"]);
    for test in TESTS {
        tests.args(["--test", test]);
    }
    tests.args(["--message-format", "json"]).env(OBJECT_VARIABLE, &object).stderr(Stdio::inherit());
    let output = tests.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the tests do not build");
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let (mut executables, mut files) = (Vec::new(), Vec::new());
    for message in messages {
        let Some(path) = message["executable"].as_str().map(PathBuf::from) else { continue };
        let name = message["target"]["name"].as_str().unwrap_or_default();
        if TESTS.contains(&name) { executables.push(path) } else { files.push(path) }
    }
    executables.sort();
    Ok(Programs { tests: executables, files, object })
}
