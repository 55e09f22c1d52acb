//! Worlds to test in: nodes, pods and agents in network namespaces of their own, and an API server
//! stand-in. Behind feature `testing`; never shipped.
//!
//! Nothing here outlives the process, even if it is killed: namespaces and mounts are held by
//! descriptors only, and children die with their parent. What remains of a killed test are empty
//! cgroup directories, which the next world removes.

pub mod agent;
pub mod apiserver;
pub mod capture;
pub mod client;
pub mod cluster;
pub mod forged;
pub mod installed;
pub mod namespace;
pub mod neighbour;
pub mod net;
pub mod objects;
mod offload;
pub mod program;
pub mod server;
pub mod stage;
pub mod steady;
pub mod tunnel;
pub mod world;
pub mod worlds;

use std::time::{Duration, Instant};

/// How long a condition may take to come true before a test gives up. Only a failure takes so long.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The same on a machine that is emulated.
const SLOW_PATIENCE: Duration = Duration::from_mins(2);

/// How long a condition may take on this machine.
pub fn patience() -> Duration {
    if std::env::var_os("PORTAL_TEST_SLOW").is_some() { SLOW_PATIENCE } else { PATIENCE }
}

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Waits until `condition` returns a value.
///
/// # Panics
/// If it does not in time; `what` is in the message.
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    within(patience(), what, condition)
}

/// As [`eventually`], of what takes longer.
///
/// # Panics
/// If it does not in time.
pub fn within<T>(patience: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + patience;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "gave up waiting: {what}");
        std::thread::sleep(POLL);
    }
}
