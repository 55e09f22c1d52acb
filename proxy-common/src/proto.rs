//! Protocol numbers (IANA), as the maps and packets carry them.

/// ICMP (RFC 792).
pub const ICMP: u8 = 1;
/// TCP (RFC 9293).
pub const TCP: u8 = 6;
/// UDP (RFC 768).
pub const UDP: u8 = 17;
/// `ICMPv6` (RFC 4443).
pub const ICMPV6: u8 = 58;
/// SCTP (RFC 9260).
pub const SCTP: u8 = 132;
/// No protocol: in a service key it stands for "this address is a VIP, whatever the port".
pub const ANY: u8 = 0;

/// The name `kubectl` prints for a protocol number.
pub const fn name(number: u8) -> &'static str {
    match number {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        ICMP => "ICMP",
        ICMPV6 => "ICMPv6",
        _ => "?",
    }
}
