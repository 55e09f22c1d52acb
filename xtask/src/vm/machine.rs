//! The emulator.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::apt::Suite;
use crate::steps::output;

/// How long a machine may run. Only one that hangs does.
const PATIENCE: Duration = Duration::from_mins(25);
/// How often it is looked whether it has ended.
const POLL: Duration = Duration::from_millis(100);
/// How many of a failed machine's last lines are shown.
const SHOWN_LINES: usize = 25;
const PROGRAM: &str = "qemu-system-x86_64";

/// qemu, and a busybox for inside.
pub struct Emulator {
    program: PathBuf,
    /// Where it was unpacked; `None` if it is the system's own.
    root: Option<PathBuf>,
    /// A busybox that needs no libraries.
    pub busybox: PathBuf,
}

/// How a machine's tests have ended.
pub enum Ended {
    /// All passed.
    Passed,
    /// Not all, or the machine did not get that far.
    Failed(String),
}

impl Emulator {
    /// Finds qemu here, or fetches it beside the system.
    pub fn find(folder: &Path) -> Result<Self> {
        let root = folder.join("qemu");
        let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| root.join(path));
        if !busybox.iter().any(|path| path.exists()) {
            let suite = Suite::open("bookworm", folder).context(
                "no qemu for the other kernels: install qemu-system-x86 and busybox-static",
            )?;
            let packages = suite.closure(&["qemu-system-x86", "busybox-static"])?;
            suite.unpack("qemu", &packages, &root)?;
        }
        let busybox = busybox.into_iter().find(|path| path.exists()).context("no busybox")?;
        let installed = output(Command::new(PROGRAM).arg("--version")).is_some();
        let program = if installed { PROGRAM.into() } else { root.join("usr/bin").join(PROGRAM) };
        Ok(Self { program, root: (!installed).then_some(root), busybox })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(root) = &self.root {
            let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
            let libraries = libraries.map(|folder| root.join(folder).display().to_string());
            command.env("LD_LIBRARY_PATH", libraries.join(":"));
            for folder in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                command.arg("-L").arg(root.join(folder));
            }
        }
        command
    }

    /// Boots a kernel with an initial file system of so many bytes; what it writes goes to files in
    /// `folder`. Its output is shown as it comes.
    pub fn boot(&self, kernel: &Path, files: &Path, folder: &Path) -> Result<Ended> {
        let (console, out) = (folder.join("console"), folder.join("output"));
        let megabytes = 768 + 4 * fs::metadata(files)?.len() / 1_000_000;
        let mut machine = self.command();
        machine
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc"])
            .args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", &format!("{megabytes}M")])
            .args(["-no-reboot", "-kernel"])
            .arg(kernel)
            .arg("-initrd")
            .arg(files)
            .args(["-append", "console=ttyS0 loglevel=4 panic=-1 oops=panic random.trust_cpu=on"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-serial", &format!("file:{}", out.display())])
            .stdin(Stdio::null());
        fs::write(&out, "")?;
        let mut child =
            machine.spawn().with_context(|| format!("cannot run {}", self.program.display()))?;
        let end = Instant::now() + PATIENCE;
        let mut shown = 0;
        while child.try_wait()?.is_none() {
            if Instant::now() > end {
                child.kill()?;
                child.wait()?;
                return Ok(Ended::Failed(format!("no end after {PATIENCE:?}")));
            }
            shown = show(&out, shown);
            std::thread::sleep(POLL);
        }
        show(&out, shown);
        Ok(ended(&fs::read_to_string(&out).unwrap_or_default(), &console))
    }
}

/// Shows the lines that have come since; returns how many bytes were shown in all.
fn show(file: &Path, shown: usize) -> usize {
    let text = fs::read(file).unwrap_or_default();
    let fresh = &text[shown.min(text.len())..];
    let Some(end) = fresh.iter().rposition(|byte| *byte == b'\n') else { return shown };
    print!("{}", String::from_utf8_lossy(&fresh[..=end]));
    shown + end + 1
}

/// How many tests were run.
fn tests(output: &str) -> usize {
    let lines =
        output.lines().filter_map(|line| line.trim().strip_prefix("running ")?.split(' ').next());
    lines.filter_map(|number| number.parse::<usize>().ok()).sum()
}

/// What the last line says. qemu's own exit status says nothing.
fn ended(output: &str, console: &Path) -> Ended {
    match output.lines().rev().find_map(|line| line.strip_prefix("VM-EXIT: ")) {
        Some("0") if tests(output) == 0 => Ended::Failed("no test has such a name".to_owned()),
        Some("0") => Ended::Passed,
        Some(_) => Ended::Failed("see above".to_owned()),
        None => {
            let console = fs::read_to_string(console).unwrap_or_default();
            let lines: Vec<&str> = console.lines().collect();
            let tail = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n    ");
            Ended::Failed(format!("the machine has died. Its last words:\n    {tail}"))
        }
    }
}
