//! Embeds the eBPF object that `cargo xtask` built, or an empty one where there is none: plain cargo
//! commands need no eBPF toolchain, and the agent then says what is missing.

use std::path::PathBuf;
use std::{env, fs};

const VARIABLE: &str = "PORTAL_EBPF_OBJECT";

fn main() {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let embedded = folder.join("portal-ebpf.o");
    match env::var_os(VARIABLE) {
        Some(object) => {
            println!("cargo::rerun-if-changed={}", object.display());
            fs::copy(&object, embedded)
                .unwrap_or_else(|e| panic!("{VARIABLE}={}: {e}", object.display()));
        }
        None => fs::write(embedded, []).expect("OUT_DIR is writable"),
    }
}
