//! A process of a node that keeps its sockets, and asks by them whenever it is told to.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use super::agent::command;
use super::cluster::Cluster;

/// A `portal-probe` that goes on. It ends with this.
pub struct Steady {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Steady {
    /// Starts it on a node, with a mode and what that takes.
    ///
    /// # Panics
    /// If it can't be started.
    pub fn new(cluster: &Cluster, node: usize, arguments: &[&str]) -> Self {
        let program = cluster.portal.with_file_name("portal-probe");
        let mut command = command(&cluster.world.nodes[node], &program, true);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the probe starts");
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (questions, answers) = pipes.expect("both are piped");
        Self { child, questions, answers: BufReader::new(answers) }
    }

    /// Lets it ask, and says what it prints; `None` if nobody has answered.
    ///
    /// # Panics
    /// If it has ended.
    pub fn ask(&mut self) -> Option<String> {
        writeln!(self.questions, "?").expect("it reads");
        let mut line = String::new();
        let length = self.answers.read_line(&mut line).expect("it writes");
        assert!(length > 0, "the probe has ended");
        Some(line.trim().to_owned()).filter(|answer| answer != "-")
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
