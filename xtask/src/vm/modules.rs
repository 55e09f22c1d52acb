//! The modules that tests need, in the order in which they are to be loaded.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What tests need; what a kernel has built in, or has not, is passed over.
const WANTED: [&str; 7] = ["veth", "bridge", "vxlan", "tun", "sch_ingress", "cls_bpf", "act_bpf"];

/// A module and its bytes.
pub type Module = (String, Vec<u8>);

/// The wanted modules in the files of a kernel's packages, each behind those that it depends on.
pub fn modules(files: &Path) -> Result<Vec<Module>> {
    let mut known = HashMap::new();
    collect(files, &mut known)?;
    let (mut loaded, mut seen) = (Vec::new(), BTreeSet::new());
    for name in WANTED {
        add(name, &known, &mut seen, &mut loaded)?;
    }
    Ok(loaded)
}

/// Finds all module files under a folder, by name.
fn collect(folder: &Path, known: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)?.filter_map(Result::ok) {
        let path = entry.path();
        let kind = entry.file_type()?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() {
            collect(&path, known)?;
        } else if let Some((name, "ko" | "ko.xz")) = file.split_once('.') {
            known.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn add(
    name: &str,
    known: &HashMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    loaded: &mut Vec<Module>,
) -> Result<()> {
    let name = name.replace('-', "_");
    let Some(path) = known.get(&name).filter(|_| seen.insert(name.clone())) else { return Ok(()) };
    let bytes = read(path)?;
    for needed in dependencies(&bytes) {
        add(&needed, known, seen, loaded)?;
    }
    loaded.push((name, bytes));
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "ko") {
        return Ok(fs::read(path)?);
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output();
    let output = output.context("cannot run xz, which kernel modules are packed with")?;
    if !output.status.success() {
        bail!("cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

/// The names in a module's line `depends=`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const LINE: &[u8] = b"\0depends=";
    let Some(start) = module.windows(LINE.len()).position(|bytes| bytes == LINE) else {
        return Vec::new();
    };
    let rest = &module[start + LINE.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    let names = String::from_utf8_lossy(&rest[..end]).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}
