//! Requests of a node's own process: `portal-probe tcp|udp|connected-udp ADDRESS [TIMES]`.
//!
//! Prints a line for each: the server's name, the client as the server sees it, and the peer as the
//! socket does. At the first failure it prints its kind on standard error and ends.

use std::env::args;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;

use portal::testing::client::{exchange, tcp_here, udp_here, udp_socket_here};

fn main() -> ExitCode {
    let arguments: Vec<String> = args().collect();
    let (protocol, to, times) = match arguments.as_slice() {
        [_, protocol, to] => (protocol, to, "1"),
        [_, protocol, to, times] => (protocol, to, times.as_str()),
        _ => return usage(),
    };
    let (Ok(to), Ok(times)) = (to.parse(), times.parse::<u32>()) else { return usage() };
    for _ in 0..times {
        match probe(protocol, to) {
            Ok(line) => println!("{line}"),
            Err(error) => {
                eprintln!("{:?}", error.kind());
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!("usage: portal-probe tcp|udp|connected-udp ADDRESS [TIMES]");
    ExitCode::from(2)
}

fn probe(protocol: &str, to: SocketAddr) -> io::Result<String> {
    let answer = match protocol {
        "tcp" => {
            let mut connection = tcp_here(to)?;
            connection.echo(b"hello")?;
            let peer = connection.stream.get_ref().peer_addr()?;
            return Ok(format!("{} {} {peer}", connection.server, connection.seen_as));
        }
        "udp" => exchange(&udp_socket_here(to.is_ipv6(), 0)?, to, b"hello")?,
        _ => udp_here(to, b"hello")?,
    };
    Ok(format!("{} {} {}", answer.server, answer.seen_as, answer.from))
}
