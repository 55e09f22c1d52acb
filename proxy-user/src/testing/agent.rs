//! Agents as processes on a node of a [`super::world::World`].

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::apiserver::ApiServer;
use super::namespace::{Mounts, Namespace};
use super::world::{BPFFS, Node, Pod};
use super::{patience, within};

/// Where the API server stand-in listens on each node.
const API_PORT: u16 = 6443;

/// Makes `server` reachable on a node's loopback, and writes a kubeconfig that says so.
pub fn provide_api(node: &Node, server: &ApiServer) {
    let bind = || std::net::TcpListener::bind(("127.0.0.1", API_PORT)).expect("a free port");
    server.listen(node.namespace.run(bind));
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters: [{{name: lab, cluster: {{server: 'http://127.0.0.1:{API_PORT}'}}}}]\n\
         users: [{{name: lab, user: {{}}}}]\n\
         contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n"
    );
    node.mounts.run(|| std::fs::write("/mnt/kubeconfig", kubeconfig).expect("a tmpfs"));
}

/// A command that runs on a node: in its namespaces and, if it is one of the node's own processes, in
/// its cgroup. It dies with the thread that starts it.
pub fn command(node: &Node, program: &Path, in_cgroup: bool) -> Command {
    let cgroup = in_cgroup.then_some(&*node.cgroup);
    entering(program, &node.namespace, Some(&node.mounts), cgroup)
}

/// A command that runs in a network namespace. It dies with the thread that starts it.
pub fn command_in(namespace: &Namespace, program: &Path) -> Command {
    entering(program, namespace, None, None)
}

/// A command that runs in a pod: in its network namespace, and in a cgroup below its node's. It dies with the thread that starts it.
pub fn command_in_pod(node: &Node, pod: &Pod, program: &Path) -> Command {
    entering(program, &pod.namespace, None, Some(&node.cgroup))
}

fn entering(
    program: &Path,
    net: &Namespace,
    mounts: Option<&Mounts>,
    cgroup: Option<&Path>,
) -> Command {
    let mut command = Command::new(program);
    let (net, mounts) = (net.clone(), mounts.cloned());
    let procs = cgroup.map(|cgroup| cgroup.join("cgroup.procs"));
    let enter = move || {
        if let Some(procs) = &procs {
            std::fs::write(procs, "0")?;
        }
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        setns(net.fd().as_fd(), CloneFlags::CLONE_NEWNET)?;
        if let Some(mounts) = &mounts {
            setns(mounts.fd().as_fd(), CloneFlags::CLONE_NEWNS)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, and one allocation-free write to a
    // path prepared before.
    unsafe { command.pre_exec(enter) };
    command
}

/// A running agent.
pub struct Agent {
    child: Child,
    portal: PathBuf,
    log: Arc<Mutex<String>>,
}

impl Agent {
    /// Starts an agent on a node that follows the stand-in, with more arguments.
    pub fn start(node: &Node, portal: &Path, arguments: &[&str]) -> Self {
        let source = ["--kubeconfig", "/mnt/kubeconfig"];
        Self::start_with(node, portal, &[&source, arguments].concat())
    }

    /// Starts an agent on a node, with all arguments but its name and where it has its pins.
    pub fn start_with(node: &Node, portal: &Path, arguments: &[&str]) -> Self {
        let mut command = command(node, portal, false);
        command
            .args(["run", "--hostname-override", &node.name])
            .args(["--bpffs-root", &format!("{BPFFS}/portal")])
            .arg("--cgroup-root")
            .arg(&node.cgroup)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", portal.display()));
        let log = Arc::new(Mutex::new(String::new()));
        let lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let kept = Arc::clone(&log);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if std::env::var_os("PORTAL_TEST_LOG").is_some() {
                    eprintln!("{line}");
                }
                let mut log = kept.lock().expect("no panic while locked");
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { child, portal: portal.to_owned(), log }
    }

    /// What the agent has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while locked").clone()
    }

    /// A line of what the kernel says of its memory, such as `VmRSS` (now) and `VmHWM` (at most), in bytes.
    pub fn memory(&self, line: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).expect("it runs");
        let rest = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
        let number = rest.and_then(|rest| rest.trim().strip_suffix(" kB"));
        1024 * number.and_then(|number| number.parse::<u64>().ok()).expect("a number of kB")
    }

    /// The processor time that it has taken so far.
    pub fn processor_time(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = std::fs::read_to_string(path).expect("it runs");
        let (_, rest) = stat.rsplit_once(')').expect("its name is in brackets");
        // Fields 14 and 15, in hundredths of a second.
        let ticks =
            rest.split(' ').skip(12).take(2).map(|text| text.parse::<u64>().expect("a number"));
        Duration::from_millis(10 * ticks.sum::<u64>())
    }

    /// What the kernel says that its BPF tables take, in bytes.
    pub fn table_memory(&self) -> u64 {
        let folder = format!("/proc/{}/fdinfo", self.child.id());
        let files = std::fs::read_dir(folder).expect("it runs").filter_map(Result::ok);
        let tables: BTreeMap<u64, u64> = files
            .filter_map(|file| {
                let text = std::fs::read_to_string(file.path()).ok()?;
                let field = |name: &str| {
                    let rest = text.lines().find_map(|line| line.strip_prefix(name));
                    rest.and_then(|rest| rest.trim().parse().ok())
                };
                Some((field("map_id:")?, field("memlock:")?))
            })
            .collect();
        tables.values().sum()
    }

    /// Waits until the agent is in step with the cluster.
    pub fn wait_ready(&mut self, node: &Node) {
        self.wait_ready_within(patience(), node);
    }

    /// As [`Agent::wait_ready`], of a large cluster.
    pub fn wait_ready_within(&mut self, patience: Duration, node: &Node) {
        within(patience, "the agent is ready", || {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("the agent has ended: {status}\n{}", self.log());
            }
            http_status(node, 10256, "/healthz").filter(|status| *status == 200)
        });
    }

    /// Ends the agent as the kernel's OOM killer would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks the agent to end.
    pub fn terminate(mut self) -> std::process::ExitStatus {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"));
        kill(pid, Signal::SIGTERM).expect("it runs");
        self.child.wait().expect("it ends")
    }

    /// Runs `portal` with arguments on the agent's node.
    pub fn portal(&self, node: &Node, arguments: &[&str]) -> Output {
        portal(node, &self.portal, arguments)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command of `portal` that looks at the datapath of a node.
pub fn portal(node: &Node, portal: &Path, arguments: &[&str]) -> Output {
    let mut command = command(node, portal, false);
    command.args(arguments).args(["--bpffs-root", &format!("{BPFFS}/portal")]);
    command.output().unwrap_or_else(|e| panic!("{}: {e}", portal.display()))
}

/// The status of an HTTP request to the node's loopback; `None` if nobody answers.
pub fn http_status(node: &Node, port: u16, path: &str) -> Option<u16> {
    http(node, port, path)?.split(' ').nth(1)?.parse().ok()
}

/// The whole answer to an HTTP request to the node's loopback; `None` if nobody answers.
pub fn http(node: &Node, port: u16, path: &str) -> Option<String> {
    let mut stream = node.namespace.run(|| TcpStream::connect(("127.0.0.1", port))).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}
