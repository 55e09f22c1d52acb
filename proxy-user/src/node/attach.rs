//! Attaching to links as they come, again where it failed, and again where someone has taken a program off.

use std::time::{Duration, Instant};

use super::Node;
use crate::links::Role;

/// Where programs share a link's qdisc with others, how long a new pod's link is left to those. A CNI's bandwidth plugin gives it an ingress
/// qdisc, and fails, and the pod with it, if there is one already. Until then the second line serves the pod; and for good, if
/// that qdisc has no place for ours.
const COURTESY: Duration = Duration::from_secs(2);

impl Node {
    /// Attaches to a link that has come, or puts that off.
    pub(super) fn come(&mut self, ifindex: u32, name: &str, role: Role) {
        let is_new = self.is_listed && !self.datapath.is_attached(ifindex);
        if is_new && role == Role::Pod && self.datapath.leaves_room() {
            self.retries.postpone(ifindex, role, Instant::now() + COURTESY);
        } else if self.attach(ifindex, role) {
            tracing::info!("attached to {} {name} ({ifindex})", role.label());
        }
    }

    /// Attaches to a link. False if that is to be tried again.
    pub(super) fn attach(&mut self, ifindex: u32, role: Role) -> bool {
        // Before the link's programs see connections that have begun without them.
        self.note_caught();
        match self.datapath.attach(ifindex, role) {
            Ok(_) => {
                self.retries.remove(ifindex);
                true
            }
            Err(error) => {
                self.try_again(ifindex, role, &error);
                false
            }
        }
    }

    fn try_again(&mut self, ifindex: u32, role: Role, error: &anyhow::Error) {
        match self.retries.insert(ifindex, role, Instant::now()) {
            // Most often it has just gone; then netlink says so next.
            2 => tracing::warn!("{error:#}; is tried again"),
            tries => tracing::debug!("{error:#} (try {tries})"),
        }
    }

    /// Attaches to one of the links that it is time to try again: others may have something to do in between.
    pub(super) fn attach_again(&mut self) {
        let Some((ifindex, role)) = self.retries.due(Instant::now()) else { return };
        if self.attach(ifindex, role) {
            tracing::info!("attached to {} {ifindex}", role.label());
        }
    }

    pub(super) fn note_caught(&mut self) {
        let noted = self.datapath.note_caught();
        let text = "connections of pods that were opened without programs on their links may break";
        self.say(noted.is_err(), text.to_owned());
        if let Err(error) = noted {
            tracing::debug!("{error:#}");
        }
    }

    /// Puts back what someone else has taken off, and counts it.
    pub(super) fn reattach(&mut self) {
        let mut fresh = 0;
        for (ifindex, role) in self.datapath.attached() {
            match self.datapath.attach(ifindex, role) {
                Ok(programs) => fresh += programs,
                Err(error) => self.try_again(ifindex, role, &error),
            }
        }
        let sockets = self.datapath.attach_sockets();
        fresh += sockets.as_ref().map_or(0, |programs| *programs);
        let text = "the node's own sockets may not be led to Services; is tried again".to_owned();
        self.say(sockets.is_err(), text);
        if fresh > 0 {
            tracing::warn!(
                "{fresh} programs had been taken off their links or cgroup, and are back"
            );
            self.status.reattached(fresh);
        }
    }
}
