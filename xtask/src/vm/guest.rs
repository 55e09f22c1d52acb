//! What is inside a test machine: an initial file system with the tests and all that they need.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cpio::newc::{Builder, trailer};

use super::Programs;
use super::kernel::Kernel;
use super::machine::{Emulator, Ended};
use super::modules::modules;
use crate::steps::output;

const INIT: &str = include_str!("init.sh");
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;

/// A machine to be.
pub struct Guest<'a> {
    /// Its kernel.
    pub kernel: &'a Kernel,
    /// What it runs on.
    pub emulator: &'a Emulator,
    /// What runs on it.
    pub programs: &'a Programs,
}

impl Guest<'_> {
    /// Runs the tests.
    pub fn run(&self, filter: Option<&str>) -> Result<Ended> {
        println!("\n== Linux {}", self.kernel.version);
        let files = self.kernel.folder.join("files.cpio");
        self.pack(&files, filter)?;
        self.emulator.boot(&self.kernel.image, &files, &self.kernel.folder)
    }

    fn pack(&self, place: &Path, filter: Option<&str>) -> Result<()> {
        let file =
            File::create(place).with_context(|| format!("cannot write {}", place.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));
        archive.add("/init", INIT.as_bytes())?;
        archive.add("/bin/busybox", &fs::read(&self.emulator.busybox)?)?;
        archive.add("/bin/sh", &fs::read(&self.emulator.busybox)?)?;
        archive.add("/command", self.command(filter).as_bytes())?;
        let modules = modules(&self.kernel.files)?;
        for (name, bytes) in &modules {
            archive.add(&format!("/modules/{name}.ko"), bytes)?;
        }
        let order: Vec<&str> = modules.iter().map(|(name, _)| name.as_str()).collect();
        archive.add("/modules/order", (order.join("\n") + "\n").as_bytes())?;
        archive.add(OBJECT, &fs::read(&self.programs.object)?)?;
        // An API client does not start without any certificates.
        if let Ok(certificates) = fs::read(CERTIFICATES) {
            archive.add(CERTIFICATES, &certificates)?;
        }
        let bpftool = ["/usr/sbin/bpftool", "/usr/bin/bpftool"].map(PathBuf::from);
        let bpftool = bpftool.into_iter().find(|path| path.exists());
        let programs = self.programs.tests.iter().chain(&self.programs.files).chain(&bpftool);
        for program in programs {
            archive.add_program(program, &self.kernel.folder)?;
        }
        archive.finish()
    }

    /// The tests, one file after the other.
    fn command(&self, filter: Option<&str>) -> String {
        let filter = filter.unwrap_or_default();
        let run = |test: &PathBuf| {
            format!("{} --test-threads 1 --nocapture {filter} || status=1\n", test.display())
        };
        let tests: String = self.programs.tests.iter().map(run).collect();
        format!(
            "export PORTAL_EBPF_OBJECT={OBJECT} PORTAL_TEST_SLOW=1 RUST_BACKTRACE=0\n\
             status=0\n{tests}exit $status\n"
        )
    }
}

/// Where the eBPF object is in the machine.
const OBJECT: &str = "/portal-ebpf.o";

/// An archive of files that the kernel unpacks when it boots.
struct Archive<W: Write> {
    to: W,
    known: BTreeSet<PathBuf>,
    number: u32,
}

impl<W: Write> Archive<W> {
    fn new(to: W) -> Self {
        Self { to, known: BTreeSet::new(), number: 0 }
    }

    fn entry(&mut self, path: &Path, mode: u32) -> Builder {
        self.number += 1;
        let name = path.strip_prefix("/").unwrap_or(path).display().to_string();
        Builder::new(&name).ino(self.number).mode(mode)
    }

    /// Adds a file, and the folders that it is in.
    fn add(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        let path = Path::new(path);
        let mut folders: Vec<&Path> = path.ancestors().skip(1).collect();
        folders.pop();
        for folder in folders.into_iter().rev() {
            if self.known.insert(folder.to_owned()) {
                self.entry(folder, DIRECTORY).write(&mut self.to, 0).finish()?;
            }
        }
        if self.known.insert(path.to_owned()) {
            let size = u32::try_from(bytes.len()).context("a file is too large")?;
            let entry = self.entry(path, FILE);
            let mut writer = entry.write(&mut self.to, size);
            writer.write_all(bytes)?;
            writer.finish()?;
        }
        Ok(())
    }

    /// Adds a program at its own path, without what only a debugger reads, and its libraries.
    fn add_program(&mut self, program: &Path, scratch: &Path) -> Result<()> {
        let stripped = scratch.join("stripped");
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").arg(&stripped).arg(program);
        let bytes = match output(&mut strip) {
            Some(_) => fs::read(&stripped)?,
            None => fs::read(program)?,
        };
        self.add(&program.display().to_string(), &bytes)?;
        let libraries = output(Command::new("ldd").arg(program)).unwrap_or_default();
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            let library = library.trim_end_matches(':');
            self.add(library, &fs::read(library)?)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        trailer(&mut self.to)?;
        self.to.flush()?;
        Ok(())
    }
}
