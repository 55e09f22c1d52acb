//! Debian's kernels.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::apt::Suite;

/// A kernel to test on.
pub struct Release {
    /// How it is called here.
    pub name: &'static str,
    /// Debian's suite that has it.
    suite: &'static str,
}

/// The kernels to test on: the oldest that is promised, those of Debian 12 and 13, and the newest.
pub const KERNELS: [Release; 4] = [
    Release { name: "5.10", suite: "bullseye" },
    Release { name: "6.1", suite: "bookworm" },
    Release { name: "6.12", suite: "trixie" },
    Release { name: "newest", suite: "sid" },
];

/// A kernel that is here.
pub struct Kernel {
    /// Its version as Debian has it.
    pub version: String,
    /// The kernel itself.
    pub image: PathBuf,
    /// All that its packages hold.
    pub files: PathBuf,
    /// Where to keep what is made for it.
    pub folder: PathBuf,
}

/// Finds a kernel, fetching it if it is not here. The smaller one for clouds has all that is needed.
pub fn fetch(release: &Release, folder: &Path) -> Result<Kernel> {
    let place = folder.join(release.name);
    let files = place.join("files");
    if !place.join("version").exists() {
        let suite = Suite::open(release.suite, folder)?;
        let version = newest(&suite)?;
        let packages = packages(&suite, &version)?;
        let _ = fs::remove_dir_all(&files);
        suite.unpack(&format!("Linux {version}"), &packages, &files)?;
        fs::write(place.join("version"), &version)?;
    }
    let version = fs::read_to_string(place.join("version"))?;
    let image = [
        files.join(format!("boot/vmlinuz-{version}")),
        files.join(format!("usr/lib/modules/{version}/vmlinuz")),
    ];
    let image = image.into_iter().find(|image| image.exists());
    let image = image.with_context(|| format!("the packages of Linux {version} hold no kernel"))?;
    Ok(Kernel { version, image, files, folder: place })
}

/// The version of a suite's newest kernel: what its package without a version depends on.
fn newest(suite: &Suite) -> Result<String> {
    let depends = suite.dependencies("linux-image-cloud-amd64")?;
    let versions = depends.iter().filter_map(|name| name.strip_prefix("linux-image-"));
    let version = versions.into_iter().find(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    Ok(version.context("Debian's kernels are named in another way than known")?.to_owned())
}

/// The packages that hold a kernel, its modules and its list of what is built in: one, or of late three.
fn packages(suite: &Suite, version: &str) -> Result<Vec<String>> {
    let image = format!("linux-image-{version}");
    let parts = ["binary", "modules", "base"].map(|part| format!("linux-{part}-{version}"));
    let is_split = suite.dependencies(&image)?.contains(&parts[0]);
    Ok(if is_split { parts.into() } else { vec![image] })
}
