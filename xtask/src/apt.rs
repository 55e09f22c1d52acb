//! Debian's packages of any suite, fetched and unpacked beside the system: apt is given a state of its own,
//! so nothing is installed, and the system's lists and settings stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::steps::{output, quietly};

/// How long package lists are good for: what they name goes when something newer comes.
const FRESH: Duration = Duration::from_hours(24);

fn is_fresh(file: &Path) -> bool {
    let age = fs::metadata(file).and_then(|file| file.modified()).ok().map(|time| time.elapsed());
    age.is_some_and(|age| age.is_ok_and(|age| age < FRESH))
}

/// A suite of Debian's, as apt sees it.
pub struct Suite {
    name: &'static str,
    folder: PathBuf,
}

impl Suite {
    /// Opens a suite, with its lists in `folder`; they are fetched if they are not there.
    ///
    /// # Errors
    /// If this is no Debian, or the lists can't be fetched.
    pub fn open(name: &'static str, folder: &Path) -> Result<Self> {
        let suite = Self { name, folder: folder.join(format!("apt-{name}")) };
        for part in ["lists/partial", "cache/archives/partial", "empty"] {
            fs::create_dir_all(suite.folder.join(part))?;
        }
        fs::write(suite.folder.join("status"), "")?;
        fs::write(suite.folder.join("sources.list"), suite.sources()?)?;
        let fetched = suite.folder.join("fetched");
        if !is_fresh(&fetched) {
            let what = format!("fetching the package lists of Debian {name}");
            match quietly(&what, "10 s", suite.apt("apt-get").arg("update")) {
                Ok(()) => fs::write(&fetched, "")?,
                // What old lists name may still be there.
                Err(error) if fetched.exists() => eprintln!("{error:#}; older ones are used"),
                Err(error) => return Err(error),
            }
        }
        Ok(suite)
    }

    /// The suite at the mirror that this system uses.
    fn sources(&self) -> Result<String> {
        let mut targets = Command::new("apt-get");
        targets.args(["indextargets", "--format", "$(REPO_URI)"]);
        let uris =
            output(&mut targets).context("apt-get, which fetches the kernels, is not here")?;
        let main =
            uris.lines().map(|uri| uri.trim_end_matches('/')).find(|uri| uri.ends_with("/debian"));
        let Some(main) = main else { bail!("apt has no source of Debian's packages") };
        let signed = "[arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
        let name = self.name;
        let sources = format!("deb {signed} {main} {name} main\n");
        if name == "sid" {
            return Ok(sources);
        }
        Ok(format!("{sources}deb {signed} {main}-security {name}-security main\n"))
    }

    fn apt(&self, program: &str) -> Command {
        let at = |part: &str| self.folder.join(part).display().to_string();
        let mut command = Command::new(program);
        for option in [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            format!("Dir::Etc::sourceparts={}", at("empty")),
            format!("Dir::Etc::preferencesparts={}", at("empty")),
            format!("Dir::State={}", at("")),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::State::status={}", at("status")),
            format!("Dir::Cache={}", at("cache")),
            "Acquire::Languages=none".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    /// What a package depends on, as its one line says.
    ///
    /// # Errors
    /// If there is no such package.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let mut show = self.apt("apt-cache");
        show.args(["show", "--no-all-versions", package]);
        let text = output(&mut show)
            .with_context(|| format!("Debian {} has no package {package}", self.name))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        let names = line.split(", ").filter_map(|one| one.split(' ').next());
        Ok(names.map(str::to_owned).collect())
    }

    /// All packages that would be installed with some.
    ///
    /// # Errors
    /// If apt can't tell.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut install = self.apt("apt-get");
        install.args(["install", "--simulate", "--no-install-recommends"]).args(packages);
        let text = output(&mut install).context("apt can't tell what is needed")?;
        let names = text.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
        Ok(names.map(str::to_owned).collect())
    }

    /// Fetches packages and unpacks them into `folder`.
    ///
    /// # Errors
    /// If one can't be fetched.
    pub fn unpack(&self, what: &str, packages: &[String], folder: &Path) -> Result<()> {
        let debs = self.folder.join("debs");
        let _ = fs::remove_dir_all(&debs);
        fs::create_dir_all(&debs)?;
        let mut download = self.apt("apt-get");
        download.current_dir(&debs).arg("download").args(packages);
        quietly(&format!("fetching {what}"), "20 s", &mut download)?;
        fs::create_dir_all(folder)?;
        for deb in fs::read_dir(&debs)?.filter_map(Result::ok) {
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("--extract").arg(deb.path()).arg(folder);
            output(&mut unpack)
                .with_context(|| format!("cannot unpack {}", deb.path().display()))?;
        }
        fs::remove_dir_all(&debs)?;
        Ok(())
    }
}
