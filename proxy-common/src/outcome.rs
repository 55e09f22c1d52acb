//! Every way a packet or a socket call can leave Portal, each with a stable label.

macro_rules! outcomes {
    ($($(#[$doc:meta])+ $name:ident = $label:literal,)+) => {
        /// What was done with a packet or a socket call. Counted by name in the map `outcomes`.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u32)]
        pub enum Outcome { $($(#[$doc])+ $name,)+ }

        impl Outcome {
            /// All outcomes, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The name in metrics and listings. Never changes once released.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label),+ }
            }
        }
    };
}

outcomes! {
    /// Neither IPv4 nor IPv6: not touched.
    NotIp = "not_ip",
    /// No Service's packet, or one whose flow is not known: not touched.
    NotService = "not_service",
    /// Shorter than its headers say, or with headers that no stack accepts: not touched.
    Malformed = "malformed",
    /// First packet of a new flow, rewritten toward a backend.
    Opened = "opened",
    /// Packet of a flow, rewritten toward its backend.
    Forwarded = "forwarded",
    /// The client has shown that it hears its backend: the flow is live from now on. Rewritten.
    Established = "established",
    /// Packet of a flow, rewritten toward its client.
    Replied = "replied",
    /// Packet that leaves by an uplink with the node's address in the place of its source, or an answer to it that
    /// gets it back.
    Masqueraded = "masqueraded",
    /// Packet of a masqueraded flow that was sent on past the host stack, where that would do nothing but forward it.
    ShortCut = "short_cut",
    /// Packet of a pod that reaches itself, rewritten and sent back out of its link.
    Hairpin = "hairpin",
    /// Packet to a VIP that was not translated where it came in, or the answer to one: rewritten where it would have left the
    /// node, and let in again.
    Caught = "caught",
    /// ICMP error about a flow's packet, rewritten outside and in.
    IcmpError = "icmp_error",
    /// Later fragment of a rewritten datagram, rewritten alike.
    Fragment = "fragment",
    /// Later fragment to a VIP whose first fragment was not seen: dropped.
    FragmentUnknown = "fragment_unknown",
    /// TCP to a VIP with no endpoint or no such port: answered with a reset.
    Reset = "reset",
    /// Datagram to a VIP with no endpoint or no such port: answered with ICMP port unreachable.
    Unreachable = "unreachable",
    /// ICMP echo to a `ClusterIP`: answered.
    EchoReply = "echo_reply",
    /// A packet to a VIP that gets no answer by rule (a reset, an ICMP message): dropped.
    Silent = "silent",
    /// A packet to a Service that has backends, but none on this node, where its policy asks for one:
    /// dropped (KP-55, KP-60).
    NoLocal = "no_local",
    /// A packet from outside a Service's source ranges: dropped (KP-91).
    NotAllowed = "not_allowed",
    /// In a flood of new connections, a SYN of a client who has yet to show that his address is his own: answered by a
    /// challenge.
    Challenged = "challenged",
    /// The answer to a challenge: the client's next SYN is let in. Dropped.
    Verified = "verified",
    /// No address of the node is known on the link by which a packet leaves that is to be masqueraded: dropped.
    NoSource = "no_source",
    /// Every source port that was tried belongs to a flow that is alive: dropped.
    NoPort = "no_port",
    /// A flow is live, but the table of live flows has no room: it is served from where flows can be
    /// evicted. Counted beside the packet's own outcome.
    TableFull = "table_full",
    /// The kernel refused to change the packet: dropped.
    NotWritable = "not_writable",
    /// A socket call whose address was translated to a backend.
    SocketTranslated = "socket_translated",
    /// A socket call to a VIP with no endpoint or no such port: refused.
    SocketRefused = "socket_refused",
    /// A socket was shown the VIP in place of the backend.
    SocketRestored = "socket_restored",
}

impl Outcome {
    /// The number under which the outcome is counted.
    pub const fn index(self) -> u32 {
        self as u32
    }

    /// Whether the packet goes back to where it came from.
    pub const fn turns_back(self) -> bool {
        matches!(
            self,
            Self::Hairpin
                | Self::Caught
                | Self::Reset
                | Self::Unreachable
                | Self::EchoReply
                | Self::Challenged
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Outcome;

    #[test]
    fn numbers_are_positions_and_labels_differ() {
        for (position, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(outcome.index() as usize, position);
            assert!(Outcome::ALL[..position].iter().all(|o| o.label() != outcome.label()));
        }
    }
}
