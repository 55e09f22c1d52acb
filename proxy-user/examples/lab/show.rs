//! What the audience sees.

use std::fmt::Display;
use std::io::IsTerminal;
use std::time::Duration;

use anstream::{print, println};
use anstyle::{AnsiColor, Style};

use portal::testing::capture::Seen;

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const GREEN: Style = AnsiColor::Green.on_default();
const RED: Style = AnsiColor::Red.on_default().bold();
const CYAN: Style = AnsiColor::Cyan.on_default();

/// Text in a style.
fn styled(style: Style, text: impl Display) -> String {
    format!("{style}{text}{style:#}")
}

/// Keeps count of the scenes and of what was claimed.
#[derive(Default)]
pub struct Show {
    scene: u32,
    checks: u32,
    failures: Vec<String>,
}

impl Show {
    /// Begins the next scene.
    pub fn scene(&mut self, text: &str) {
        self.scene += 1;
        println!("\n{} {}", styled(CYAN.bold(), self.scene), styled(BOLD, text));
    }

    /// A claim, and whether it holds.
    pub fn check(&mut self, holds: bool, claim: impl Display) {
        self.checks += 1;
        if holds {
            println!("    {} {claim}", styled(GREEN, "✓"));
        } else {
            println!("    {} {}", styled(RED, "✗"), styled(RED, &claim));
            self.failures.push(claim.to_string());
        }
    }

    /// The last words. Says whether all claims held.
    pub fn curtain(&self, took: Duration) -> bool {
        let seconds = took.as_secs_f32();
        if self.failures.is_empty() {
            let line = format!("All {} claims held, in {seconds:.1} s.", self.checks);
            println!("\n{}", styled(GREEN.bold(), line));
        } else {
            let line = format!("{} of {} claims did not hold:", self.failures.len(), self.checks);
            println!("\n{}", styled(RED, line));
            self.failures.iter().for_each(|claim| println!("  - {claim}"));
        }
        self.failures.is_empty()
    }
}

/// The title.
pub fn title(text: &str, below: &str) {
    println!("\n{}\n{}", styled(BOLD, text), styled(DIM, below));
}

/// A line of the story.
pub fn say(text: impl Display) {
    println!("    {text}");
}

/// A line that explains.
pub fn aside(text: impl Display) {
    println!("    {}", styled(DIM, text));
}

/// A command with its output.
pub fn command(command: &str, output: &str) {
    println!("    {}", styled(DIM, format!("$ {command}")));
    for line in output.trim_end().lines() {
        println!("    {line}");
    }
}

/// What a capture saw first in each direction.
pub fn packets(place: &str, seen: &[Seen]) {
    for (index, packet) in seen.iter().enumerate() {
        let place = if index == 0 { place } else { "" };
        let (from, to) = (end(packet.src, packet.sport), end(packet.dst, packet.dport));
        println!("    {place:<22}{from:>24} → {}", styled(CYAN, to));
    }
}

/// How often each pod was reached, as bars.
pub fn bars(counts: &[(String, u32)]) {
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    for (name, count) in counts {
        let width = (count * 40).div_ceil(most) as usize;
        let space = if width == 0 { "" } else { " " };
        println!("    {name:<12}{}{space}{count}", styled(CYAN, "█".repeat(width)));
    }
}

/// Waits for Enter.
pub fn wait() {
    if !std::io::stdin().is_terminal() {
        aside("(standard input is no terminal: the lab stays up until it closes)");
    }
    print!("\n{}", styled(BOLD, "Press Enter to take the lab down. "));
    let _ = std::io::Write::flush(&mut std::io::stdout());
    let _ = std::io::stdin().read_line(&mut String::new());
}

fn end(address: std::net::IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

/// A time span as people say it.
pub fn span(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}
