//! One step of work at a time: said in a line, shown with a spinner while it runs, its output kept in
//! a file that is shown only if the step fails.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// How often a waiting step looks whether its command has ended.
const POLL: Duration = Duration::from_millis(50);
/// How many of a failed command's last lines are shown.
const SHOWN_LINES: usize = 30;

/// The workspace's root.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("xtask is a member of the workspace").to_owned()
}

/// The folder for all that is built or fetched.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs `command` with its output kept aside. `what` says what it does, `duration` how long that
/// usually takes.
///
/// # Errors
/// If it can't be started or fails; the last lines of its output are in the error.
pub fn quietly(what: &str, duration: &str, command: &mut Command) -> Result<()> {
    let folder = target().join("tools");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let name: String = what.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    let log = folder.join(format!("{name}.log"));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let bar = spinner(what, duration);
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(POLL),
        }
    };
    bar.finish_and_clear();
    if !status.success() {
        bail!("{what} failed ({status}). Its last lines:\n{}", tail(&log));
    }
    eprintln!("  {what}: done in {} s", started.elapsed().as_secs());
    Ok(())
}

fn spinner(what: &str, duration: &str) -> ProgressBar {
    eprintln!("  {what} (about {duration}) ...");
    let bar = ProgressBar::new_spinner();
    let style = ProgressStyle::with_template("  {spinner} {msg} {elapsed}").expect("valid");
    bar.set_style(style);
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
    format!("    {}\n  (all of it: {})", shown.join("\n    "), log.display())
}

/// Runs `command` in view of the user.
///
/// # Errors
/// If it can't be started or fails.
pub fn openly(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let status = command.status().with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("{program} failed ({status})");
    }
    Ok(())
}

/// What `command` prints; `None` if it can't be run or fails.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command.stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
