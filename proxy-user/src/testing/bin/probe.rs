//! One request of a node's own process: `portal-probe tcp|udp|connected-udp ADDRESS`.
//!
//! Prints the server's name, the client as the server sees it, and the peer as the socket does; or, on
//! standard error, the kind of the failure.

use std::env::args;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;

use portal::testing::client::{exchange, tcp_here, udp_here, udp_socket_here};

fn main() -> ExitCode {
    let arguments: Vec<String> = args().collect();
    let [_, protocol, to] = arguments.as_slice() else {
        eprintln!("usage: portal-probe tcp|udp|connected-udp ADDRESS");
        return ExitCode::from(2);
    };
    match to.parse().map_err(io::Error::other).and_then(|to| probe(protocol, to)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{:?}", error.kind());
            ExitCode::FAILURE
        }
    }
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
